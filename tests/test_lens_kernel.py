"""The passes over the logits that the lens is made of, against loops, float64 and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.analyses.lens.head import LinearHead
from streamlens.analyses.lens.metrics import METRICS, Workspace, Yardstick, top_k
from streamlens.analyses.lens.trace import Chain
from tests.test_lens import KS, _one


class TestKernel:
    """The passes over the logits, on a vocabulary larger than the groups in which the likeliest are looked for."""

    VOCAB, WIDTH, TOKENS = 5203, 16, 13

    def setting(self) -> tuple[LinearHead, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        head = LinearHead(Chain.of(None), torch.randn(self.VOCAB, self.WIDTH, generator=generator), ())
        states = torch.randn(2, self.TOKENS, self.WIDTH, generator=generator)
        return head, states[0], states[1], torch.randint(-1, self.VOCAB, (self.TOKENS,), generator=generator)

    def test_equals_a_loop(self) -> None:
        head, first, second, targets = self.setting()
        found = Yardstick(Workspace(head, self.TOKENS, KS, torch.float32, jsd=True), first, targets).measure(second)
        assert found.jsd is not None
        for t in range(self.TOKENS):
            exact = _one(
                head.weight.double() @ first[t].double(), head.weight.double() @ second[t].double(), int(targets[t])
            )
            for i, name in enumerate(METRICS):
                assert float(found.values[i, t]) == pytest.approx(
                    exact.get(name, np.nan), rel=2e-5, abs=1e-5, nan_ok=True
                )
            assert float(found.jsd[t]) == pytest.approx(exact["jsd"], abs=1e-5)
            for i, k in enumerate(KS):
                assert float(found.overlap[i, t]) == pytest.approx(exact[f"overlap_{k}"])

    def test_large_logits_neither_overflow_nor_lose_the_divergence(self) -> None:
        head, first, second, targets = self.setting()
        steep = LinearHead(head.prelude, head.weight * 100, ())
        found = Yardstick(Workspace(steep, self.TOKENS, (1,), torch.float32), first, targets).measure(second)
        exact = [
            _one(steep.weight.double() @ a.double(), steep.weight.double() @ b.double(), -1)["kl"]
            for a, b in zip(first, second, strict=True)
        ]
        torch.testing.assert_close(
            found.values[0].double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-5, atol=1e-2
        )

    def test_buffers_are_used_again_and_the_states_are_left_alone(self) -> None:
        head, first, second, targets = self.setting()
        work = Workspace(head, self.TOKENS, KS, torch.float32)
        kept = first.clone(), second.clone()
        yardstick = Yardstick(work, first, targets)
        once = yardstick.measure(second).values.clone()
        yardstick.measure(first)
        torch.testing.assert_close(yardstick.measure(second).values, once, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(kept[0], first)
        assert torch.equal(kept[1], second)

    def test_half_precision_is_near_and_uses_half_precision(self) -> None:
        head, first, second, targets = self.setting()
        exact = Yardstick(Workspace(head, self.TOKENS, KS, torch.float32), first, targets).measure(second)
        low = Yardstick(Workspace(head.to(torch.bfloat16), self.TOKENS, KS, torch.float32), first, targets)
        found = low.measure(second)
        assert not torch.equal(found.values[0], exact.values[0])
        assert bool(((found.values[0] - exact.values[0]).abs() < 0.02 * (1 + exact.values[0])).all())

    @pytest.mark.parametrize(("vocab", "k"), [(5203, 10), (5120, 1), (130, 10), (7, 10), (12800, 3)])
    def test_top_k_is_that_of_torch(self, vocab: int, k: int) -> None:
        generator = torch.Generator().manual_seed(vocab)
        z = torch.randint(0, 50 if vocab > 5203 else 10**6, (9, vocab), generator=generator).float()
        z[::2, -1] = 2e6  # also where the vocabulary does not fill a group
        values, ids = top_k(z, k)
        assert torch.equal(values, z.topk(min(k, vocab)).values)
        assert torch.equal(z.gather(1, ids), values)
        assert all(len(set(row)) == min(k, vocab) for row in ids.tolist())
