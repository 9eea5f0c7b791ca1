// What covers what on the stage, in scenes that the lesson can show, at the sizes that the page gives it: a list of sentences.
async () => {
  const [{ stage }, { draw, h }] = await Promise.all([import("/static/stage.js"), import("/static/dom.js")]);
  const SIZES = [[884, 286], [1248, 274], [900, 339], [366, 330]];
  const CONSUMERS = [1, 3, 4, 6, 7];
  const HANDS = [
    { state: "working", holds: { attempt: 1 } }, { state: "working", holds: { attempt: 2 }, over: true }, { state: "working", holds: { attempt: 1, paid: true } },
    { state: "working", holds: { attempt: 1, once: true } }, { state: "killed" }, { state: "paused", holds: { attempt: 1 } }, { state: "waiting", fails: true },
  ];
  const chip = (claim, more) => ({ id: `m-${claim}`, claim, policy: 33, attempt: 1, ...more });
  const chips = (from, count, more = () => ({})) => Array.from({ length: count }, (_, at) => chip(from + at, more(at)));
  const consumer = (at) => { const hand = HANDS[at % HANDS.length]; return { number: 10 + at, left: 2, lease: 6, ...hand, holds: hand.holds ? chip(80 + at, hand.holds) : null }; };
  const scene = (consumers, documents) => ({
    frozen: false, producer: { sent: 1688, answer_ms: 128.4, refused: 0 }, paid: 1388, cents: 88888800, done: chips(10, 12, (at) => ({ times: at % 3 ? 1 : 2 })),
    queue: { name: "claims.processing", waiting: chips(30, 12, (at) => ({ locked: at % 2 === 1 })), late: chips(50, 2, () => ({ due: 13.8 })), letters: chips(60, 2), ready: 1240, delayed: 2, dead: 2, oldest: 128.4 },
    consumers: Array.from({ length: consumers }, (_, at) => consumer(at)),
    documents: documents ? { waiting: [1, 2, 3].map((claim) => ({ id: `note-${claim}`, claim })), ready: 3, printing: 400, letters: [], count: 128 } : null,
  });
  const place = document.createElement("div");
  place.style.cssText = "position: absolute; left: 0; top: 0; visibility: hidden";
  document.body.append(place);
  const all = SIZES.flatMap(([width, height]) => [false, true].flatMap((documents) => CONSUMERS.map((consumers) => ({ width, height, documents, consumers }))));
  draw(place, all.map((one) => h("div", {}, stage(scene(one.consumers, one.documents), one.width, one.height, () => {}, { grouped: true, hero: 60 }))));
  for (const one of place.querySelectorAll(".chip")) [one.style.transition, one.style.transform] = ["none", one.goal];
  const found = new Set();
  const framed = (root, selector, name, low = 0) => [...root.querySelectorAll(selector)].map((node) => {
    const { left, right, top, bottom } = node.getBoundingClientRect();
    return { name: name(node), left, right, top: top + low, bottom: bottom - low };
  });
  const meet = (one, other) => Math.min(one.right, other.right) > Math.max(one.left, other.left) && Math.min(one.bottom, other.bottom) > Math.max(one.top, other.top);
  const within = (one, other) => one.left > other.left - 1 && one.right < other.right + 1 && one.top > other.top - 1 && one.bottom < other.bottom + 1;
  [...place.querySelectorAll("svg.stage")].forEach((svg, at) => {
    const { width, height, documents, consumers } = all[at];
    const tell = (what) => found.add(`${width} × ${height}, ${consumers} consumers${documents ? ", documents" : ""}: ${what}`);
    const edge = svg.getBoundingClientRect();
    const boxes = framed(svg, "rect.box", () => "box");
    const things = [
      ...framed(svg, ".chip > rect", (node) => `chip ${node.parentNode.dataset.claim}`), ...framed(svg, ".control > rect", (node) => `button ${node.parentNode.dataset.act}`),
      ...framed(svg, "text:not(.chip text, .control text)", (node) => `“${node.textContent}”`, 4), // a line is higher than its letters
    ];
    things.forEach((one, place) => {
      if (one.left < edge.left - 1 || one.right > edge.right + 1) tell(`${one.name} lies outside`);
      if (boxes.some((box) => meet(one, box) && !within(one, box))) tell(`${one.name} crosses the edge of its box`);
      things.slice(place + 1).filter((other) => meet(one, other)).forEach((other) => tell(`${one.name} meets ${other.name}`));
    });
  });
  place.remove();
  return [...found];
}
