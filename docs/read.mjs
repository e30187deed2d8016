// A reader of streamlens captures in JavaScript, for Node: nothing but h5wasm and docs/file-format.md was used.
//
//     npm install h5wasm
//     node read.mjs model.h5 0 17 255
//
// It adds up the embedding parts and the writes of the tokens that are named, in the order that the file records and
// in the model's own precision, and compares the sum with the last state, bit for bit. Exit code 1 if they differ.
import * as h5wasm from "h5wasm/node";

// The bits of a bfloat16 are the upper half of those of a float32.
const word = new Uint32Array(1);
const single = new Float32Array(word.buffer);
const fromBfloat16 = (bits) => ((word[0] = bits << 16), single[0]);
const roundToBfloat16 = (value) => {
  single[0] = value; // to float32 first, as PyTorch does; then to the nearest, ties to even
  word[0] = (word[0] + 0x7fff + ((word[0] >>> 16) & 1)) & 0xffff0000;
  return single[0];
};
const rounding = { float32: Math.fround, bfloat16: roundToBfloat16 };

function refuse(why) {
  console.error(why);
  process.exit(2);
}

function read(file, name, ranges) {
  const dataset = file.get(name);
  if (dataset.attrs.dtype?.value !== "bfloat16") return Array.from(dataset.slice(ranges));
  // h5wasm has no word for floats of two bytes: ask for the same bytes as integers.
  Object.assign(dataset.metadata, { type: 0, signed: false });
  return Array.from(dataset.slice(ranges), fromBfloat16);
}

// One recorded list of operations, such as {operator: "aten.add.Tensor", args: ["@state", "@write:3"], output: "@v7"}.
function run(instructions, known, round, first) {
  let last = first;
  for (const { operator, args, kwargs, output } of instructions) {
    if (operator !== "aten.add.Tensor" || Object.keys(kwargs).length || args.some((name) => !(name in known))) {
      refuse(`this short reader knows additions of two tensors alone, not ${operator}(${args})`);
    }
    const [left, right] = args.map((name) => known[name]);
    known[output] = left.map((value, i) => round(value + right[i]));
    last = output;
  }
  return known[last];
}

await h5wasm.ready;
const [path, ...chosen] = process.argv.slice(2);
const file = new h5wasm.File(path, "r");
const about = Object.fromEntries(Object.entries(file.attrs).map(([key, attribute]) => [key, attribute.value]));
if (about.format !== "streamlens-capture" || about.format_version > 1) refuse(`${path} is not a capture that this reads`);

const anatomy = JSON.parse(about.anatomy);
const stream = anatomy.streams.find((one) => one.name === anatomy.head.stream);
const base = `streams/${stream.name}`;
const own = JSON.parse(file.get(base).attrs.own_dtypes.value);
const dtypes = new Set(Object.values(own).flat());
const round = dtypes.size === 1 ? rounding[about.dtype] : undefined;
if (!round) refuse(`this short reader knows float32 and bfloat16, one at a time, not ${[...dtypes].join(" and ")}`);

const rows = JSON.parse(file.get(base).attrs.stored.value);
if (rows.length < stream.sublayers.length) refuse(`${path} was narrowed: it does not hold every write`);
const table = file.get(`${base}/sublayers`).value; // index, layer, kind, label, module
const count = file.get("tokens/id").shape[0];
console.log(`${about.model_source}, ${about.dtype}: ${count} tokens, ${table.length} writes of ${stream.d_model}`);
console.log(`in the order ${table.slice(0, 3).map((row) => row[3]).join(", ")}, ... ${table.at(-1)[3]}`);

let differing = 0;
for (const token of (chosen.length ? chosen : ["0"]).map(Number)) {
  const one = [token, token + 1];
  const known = {};
  stream.parts.forEach((part, i) => (known[`@part:${i}`] = read(file, `${base}/embed/${part.label}`, [one, []])));
  let state = run(stream.embedding, known, round, "@part:0");
  for (const step of stream.steps) {
    const values = { "@state": state };
    for (const s of step.sublayers) values[`@write:${s}`] = read(file, `${base}/write`, [[s, s + 1], one, []]);
    state = run(step.instructions, values, round, "@state");
  }
  const final = read(file, `${base}/final`, [one, []]);
  const equal = state.filter((value, i) => Object.is(value, final[i])).length;
  differing += final.length - equal;
  console.log(`token ${token}: x = ${state[0]}, ${state[1]}, ...; ${equal} of ${final.length} equal to final`);
}
process.exitCode = differing ? 1 : 0;
