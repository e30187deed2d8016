"use strict";
// The lens grid: colour by a metric, follow a token through the layers. Everything it needs is in the page.
(() => {
  const source = document.getElementById("lens-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const table = document.querySelector("table.grid");
  const cells = new Map();
  for (const cell of table.querySelectorAll("td")) cells.set(`${cell.dataset.s},${cell.dataset.p}`, cell);
  const last = data.labels.length - 1;
  const chosen = { state: last, position: 0, token: null, metric: "kl" };

  const metrics = {
    // Each maps a cell to 0 ... 1, and says what the ends of the scale mean. Nats end at the 95th percentile: the
    // embedding alone would otherwise leave no colour to all others.
    kl: { value: (s, p) => data.kl[s][p], end: 0.95, shade: (v, top) => v / top, ends: (top) => ["0", `${top.toFixed(1)} nats or more`] },
    entropy: { value: (s, p) => data.entropy[s][p], end: 0.95, shade: (v, top) => v / top, ends: (top) => ["0", `${top.toFixed(1)} nats or more`] },
    rank: { value: (s, p) => data.rank[s][p], shade: (v, top) => Math.log1p(v) / Math.log1p(top), ends: (top) => ["0 (likeliest)", `${Math.round(top)} (log)`] },
    probability: { value: (s, p) => data.probability[s][p][0], shade: (v) => v, ends: () => ["0", "1"] },
  };

  function paint() {
    const metric = metrics[chosen.metric];
    const values = [];
    for (let s = 0; s <= last; s++) for (let p = 0; p < data.position.length; p++) values.push(metric.value(s, p) ?? 0);
    values.sort((a, b) => a - b);
    const top = values[Math.floor((metric.end ?? 1) * (values.length - 1))];
    for (const [key, cell] of cells) {
      const [s, p] = key.split(",").map(Number);
      const value = metric.value(s, p);
      cell.style.setProperty("--v", value == null || !top ? 0 : Math.min(1, metric.shade(value, top)).toFixed(3));
    }
    const [low, high] = metric.ends(top);
    document.getElementById("scale-low").textContent = low;
    document.getElementById("scale-high").textContent = high;
  }

  const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : p.toExponential(0));
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text != null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const drawn = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text != null) made.textContent = text;
    return made;
  };
  const word = (id) => (id < 0 ? "(none)" : data.text[id] ?? String(id));

  function describe(state, position) {
    const target = data.target[position];
    const heading = document.getElementById("lens-heading");
    heading.textContent = `x_${state} (${data.labels[state]}), position ${data.position[position]}`;
    const reads = `reads ${word(data.read[position])}` + (target >= 0 ? `; next comes ${word(target)}` : "");
    document.getElementById("lens-reads").textContent = data.causal ? reads : reads.replace("next comes", "stands for");
    const body = document.getElementById("lens-top");
    body.replaceChildren();
    data.top[state][position].forEach((id, i) => {
      const row = element("tr");
      const name = element("td");
      name.append(follower(id, position));
      row.append(name, element("td", percent(data.probability[state][position][i]), { class: "number" }));
      body.append(row);
    });
    const rank = data.rank[state][position];
    document.getElementById("lens-metrics").textContent =
      `KL ${data.kl[state][position].toFixed(2)} nats, entropy ${data.entropy[state][position].toFixed(2)} nats` +
      (rank == null ? "" : `, rank of ${data.causal ? "what came" : "the token itself"}: ${rank}`);
  }

  function follower(id, position) {
    const known = data.followed[position].indexOf(id) >= 0;
    const button = element("button", word(id), { type: "button" });
    button.setAttribute("aria-pressed", String(id === chosen.token));
    button.disabled = !known;
    button.addEventListener("click", () => follow(id));
    return button;
  }

  function follow(id) {
    const position = chosen.position;
    const place = data.followed[position].indexOf(id);
    if (place < 0) return;
    chosen.token = id;
    for (const button of document.querySelectorAll(".detail button"))
      button.setAttribute("aria-pressed", String(button.textContent === word(id)));
    document.getElementById("lens-followed").textContent = `${word(id)} through the layers`;
    chart("lens-probability", data.tracks[position].probability.map((row) => row[place]), "probability", false);
    chart("lens-rank", data.tracks[position].rank.map((row) => row[place]), "rank (log, 0 at the top)", true);
  }

  function chart(id, values, label, rank) {
    const svg = document.getElementById(id);
    svg.replaceChildren();
    const [width, height, left, right, above, below] = [300, 110, 46, 8, 16, 18];
    const top = rank ? Math.max(...values, 1) : Math.max(...values, 1e-9);
    const scaled = (v) => (rank ? Math.log1p(v) / Math.log1p(top) : 1 - v / top);
    const x = (s) => left + ((width - left - right) * s) / Math.max(1, last);
    const y = (v) => above + (height - above - below) * scaled(v);
    svg.append(drawn("path", { class: "axis", d: `M${left} ${above}V${height - below}H${width - right}` }));
    svg.append(drawn("text", { x: 0, y: 10 }, label));
    svg.append(drawn("text", { x: left - 4, y: above + 8, "text-anchor": "end" }, rank ? "0" : percent(top)));
    svg.append(drawn("text", { x: left - 4, y: height - below, "text-anchor": "end" }, rank ? String(top) : "0"));
    svg.append(drawn("text", { x: left, y: height - 4 }, "x_0"));
    svg.append(drawn("text", { x: width - right, y: height - 4, "text-anchor": "end" }, `x_${last}`));
    svg.append(drawn("path", { class: "track", d: values.map((v, s) => `${s ? "L" : "M"}${x(s).toFixed(1)} ${y(v).toFixed(1)}`).join("") }));
    svg.append(drawn("circle", { class: "here", r: 3.5, cx: x(chosen.state), cy: y(values[chosen.state]) }));
    svg.setAttribute("aria-label", `${label} of ${word(chosen.token)}: ${values[0]} at x_0, ${values[last]} at x_${last}`);
  }

  function select(state, position, focus) {
    const before = cells.get(`${chosen.state},${chosen.position}`);
    before.setAttribute("aria-selected", "false");
    before.tabIndex = -1;
    const moved = position !== chosen.position;
    chosen.state = state;
    chosen.position = position;
    const cell = cells.get(`${state},${position}`);
    cell.setAttribute("aria-selected", "true");
    cell.tabIndex = 0;
    if (focus) cell.focus();
    const followed = data.followed[position];
    const others = document.getElementById("lens-others");
    others.replaceChildren(...followed.map((id) => follower(id, position)));
    describe(state, position);
    follow(moved || chosen.token == null || followed.indexOf(chosen.token) < 0 ? followed[0] : chosen.token);
  }

  table.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (!cell) return;
    select(Number(cell.dataset.s), Number(cell.dataset.p), true);
    follow(data.top[chosen.state][chosen.position][0]);
  });
  table.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("td");
    if (cell) describe(Number(cell.dataset.s), Number(cell.dataset.p));
  });
  table.addEventListener("mouseleave", () => describe(chosen.state, chosen.position));
  const moves = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [8, 0], PageDown: [-8, 0] };
  table.addEventListener("keydown", (event) => {
    let [s, p] = [chosen.state, chosen.position];
    if (event.key in moves) [s, p] = [s + moves[event.key][0], p + moves[event.key][1]];
    else if (event.key === "Home") p = 0;
    else if (event.key === "End") p = data.position.length - 1;
    else if (event.key === "Enter" || event.key === " ") { follow(data.top[s][p][0]); event.preventDefault(); return; }
    else return;
    event.preventDefault();
    select(Math.min(last, Math.max(0, s)), Math.min(data.position.length - 1, Math.max(0, p)), true);
  });
  for (const radio of document.querySelectorAll("input[name=metric]"))
    radio.addEventListener("change", () => { chosen.metric = radio.value; paint(); });
  paint();
  select(last, 0, false);
})();
