// The stage: producer, queue with its slots, consumers, what is done; a second queue where one feeds another.
// It is drawn from whole scenes. A claim is one element wherever it is, so it travels when its place changes.

import { boxes, CARD, CHIP, isLow, middle, pipe, queueSlots, slots } from "./boxes.js";
import { h } from "./dom.js";
import { euros, number, say, seconds } from "./say.js";

const LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ";
const DONE_MAX = 12; // chips in a row of what is done

export function stage(scene, width, height, ask, options = {}) {
  const shown = scene.consumers.slice(0, 7);
  const place = boxes(width, height, shown.length, Boolean(scene.documents));
  const scale = options.scale ?? 1;
  const parts = [
    pipes(scene, place, shown),
    producer(scene, place.producer),
    queue(scene, place, ask, options),
    shown.map((one, at) => consumer(one, place.consumers[at], ask, options)),
    shown.length ? null : nobody(place, options),
    done(scene, place.done),
    scene.documents && second(scene.documents, place),
    h("g", { key: "chips" }, chips(scene, place, shown, ask, options)),
  ];
  return h("svg", {
    class: `stage${scene.frozen ? " frozen" : ""}`, viewBox: `0 0 ${width} ${place.height}`, width: width * scale, height: place.height * scale,
    role: "group", "aria-label": say("stage"),
  }, parts);
}

const text = (x, y, content, props = {}) => h("text", { x, y, ...props }, content);
const frame = (box, kind, props = {}) => h("rect", { x: box.x + 1, y: box.y + 1, width: box.w - 2, height: box.h - 2, rx: 12, class: kind, ...props });

// --- pipes -----------------------------------------------------------------------------------------------------------

function pipes(scene, place, shown) {
  const { producer: from, queue: box, done: end } = place;
  if (!place.isWide) return h("g", { key: "pipes", class: "pipes" }, downward(place));
  const y = middle(from).y;
  const exit = { x: box.x + box.w, y: box.y + box.h / 2 };
  const found = [line({ x: from.x + from.w, y }, { x: box.x, y }, scene.queue ? "" : " cut")];
  shown.forEach((one, at) => {
    const card = place.consumers[at];
    const gone = one.state === "killed" || one.state === "crashed";
    found.push(line(exit, { x: card.x, y: card.y + card.h / 2 }, gone ? " cut" : one.holds ? " busy" : ""));
    found.push(line({ x: card.x + card.w, y: card.y + card.h / 2 }, { x: end.x, y: card.y + card.h / 2 }, gone ? " cut thin" : " thin"));
  });
  if (place.second) {
    const into = middle(place.second).y;
    found.push(line({ x: place.second.x + place.second.w, y: into }, { x: place.printer.x, y: into }, ""));
    found.push(line({ x: place.printer.x + place.printer.w, y: into }, { x: place.letters.x, y: into }, " thin"));
    const [from_, to] = [place.printer.x + 34, box.x + box.w - 34];
    const top = place.done.h;
    found.push(h("g", { class: "feed" }, h("path", { d: `M${from_},${top} v14 H${to} V${place.second.y - 6}` }), h("path", { class: "head", d: `M${to - 8},${place.second.y - 13} l8,10 l8,-10` })));
  }
  return h("g", { key: "pipes", class: "pipes" }, found);
}

function line(from, to, kind) {
  const end = { x: to.x - 9, y: to.y };
  return h("g", { class: `pipe${kind}` },
    h("path", { d: pipe(from, end) }),
    h("path", { class: "arrow", d: `M${to.x - 13},${to.y - 8} L${to.x - 3},${to.y} L${to.x - 13},${to.y + 8}` }));
}

function downward(place) {
  const x = place.width / 2;
  const { producer: from, queue: box, delayed: tray, done: end } = place;
  const gaps = [[from.y + from.h, box.y - 30], [tray.y + tray.h, tray.y + tray.h + 16], [end.y - 16, end.y]];
  if (place.second) gaps.push([end.y + end.h, place.second.y], [place.second.y + place.second.h, place.printer.y], [place.printer.y + place.printer.h, place.letters.y]);
  return gaps.map(([from, to]) => h("path", { class: "down", d: `M${x},${from + 2} V${to}` }));
}

// --- boxes -----------------------------------------------------------------------------------------------------------

function producer(scene, box) {
  const told = scene.producer;
  const x = box.x + box.w / 2;
  const right = box.x + box.w;
  const sent = say("sent_n", { n: told.sent });
  if (box.w > 200) {
    return h("g", { key: "producer" }, frame(box, "box"), text(box.x + 14, box.y + 30, say("producer"), { class: "strong" }), text(box.x + 14, box.y + 56, say("portal"), { class: "soft" }),
      text(right - 102, box.y + 50, number(told.sent), { class: "huge end" }), text(right - 14, box.y + 48, sent, { class: "soft end" }));
  }
  if (box.h < 130) {
    return h("g", { key: "producer" }, frame(box, "box"), text(x, box.y + 24, say("producer"), { class: "name mid" }), text(x, box.y + box.h - 40, number(told.sent), { class: "huge mid" }), text(x, box.y + box.h - 14, sent, { class: "soft mid" }));
  }
  const answers = told.answer_ms !== null && box.h > 165;
  return h("g", { key: "producer" }, frame(box, "box"), text(x, box.y + 28, say("producer"), { class: "name mid" }), text(x, box.y + 50, say("portal"), { class: "soft mid" }),
    text(x, box.y + 92, number(told.sent), { class: "huge mid" }), text(x, box.y + 114, sent, { class: "soft mid" }),
    answers ? text(x, box.y + 142, say("answered_in"), { class: "soft mid" }) : null, answers ? text(x, box.y + 162, `${number(told.answer_ms, 1)}\u00a0ms`, { class: "soft mid" }) : null);
}

function queue(scene, place, ask, options) {
  const box = place.queue;
  const told = scene.queue;
  if (!told) {
    return h("g", { key: "queue" }, frame(box, "box missing"),
      text(middle(box).x, middle(box).y, say("no_queue"), { class: "soft mid" }));
  }
  const fits = queueSlots(box).length;
  const more = Math.max(0, told.ready - fits);
  const due = Math.max(0, told.late[0]?.due ?? 0);
  return h("g", { key: "queue" },
    text(middle(box).x, box.y - 9, h("tspan", { class: "mono strong" }, `queue · ${told.name}`), { class: "mid" }),
    frame(box, "box queue"),
    text(box.x + box.w - 12, box.y + (isLow(box) ? 25 : 28), say(box.w > (more ? 400 : 280) && !isLow(box) ? "fifo_long" : "fifo"), { class: "soft end" }),
    more && !isLow(box) ? text(box.x + 14, box.y + 28, `+${number(more)}`, { class: "strong accent" }) : null,
    queueSlots(box).map((slot) => h("rect", { x: slot.x, y: slot.y, width: CHIP.w, height: CHIP.h, rx: 9, class: "slot" })),
    text(box.x + 14, box.y + (isLow(box) ? 25 : box.h - 12), say("ready_n", { n: told.ready }), { class: "strong" }),
    told.ready && told.oldest > 0 && box.w > 230 && !isLow(box) ? text(box.x + box.w - 12, box.y + box.h - 12, say("oldest", { s: told.oldest.toFixed(1) }), { class: "soft end" }) : null,
    tray(place.delayed, say("delayed"), told.delayed, seconds(due, due < 10 ? 1 : 0), "delayed"),
    tray(place.dead, say("dead_letters"), told.dead, number(told.dead), told.dead ? "deadbox" : ""));
}

function tray(box, title, count, about, kind) {
  return h("g", {}, frame(box, `box tray ${kind}`), text(box.x + 12, box.y + (count ? 18 : 26), title, { class: "soft" }),
    count ? text(box.x + box.w - 10, box.y + 48, about, { class: "soft end" }) : text(box.x + 12, box.y + 50, say("none"), { class: "soft" }));
}

function done(scene, box) {
  const x = middle(box).x;
  if (box.w > 200) {
    return h("g", { key: "done" }, frame(box, "box"), text(box.x + 14, box.y + 30, say("processed"), { class: "strong" }),
      text(box.x + 14, box.y + 54, amount(scene), { class: "good" }), text(box.x + box.w - 14, box.y + 50, number(scene.processed), { class: "huge end" }));
  }
  return h("g", { key: "done" }, frame(box, "box"),
    text(x, box.y + 28, say("processed"), { class: "strong mid" }),
    text(x, box.y + 66, number(scene.processed), { class: "huge mid" }),
    text(x, box.y + 92, amount(scene), { class: "good mid" }));
}

const amount = (scene) => (scene.cents === null ? "" : euros(scene.cents)); // a replay knows no amounts

function nobody(place, options) {
  const x = place.isWide ? place.done.x - 26 - CARD : 0;
  const y = place.isWide ? 40 : place.delayed.y + 84;
  const box = { x, y, w: place.isWide ? CARD : place.width, h: 96 };
  return h("g", { key: "nobody" }, frame(box, "box missing"), text(middle(box).x, middle(box).y + 6, say("no_consumer"), { class: "soft mid" }));
}

function second(told, place) {
  const { second: box, printer, letters } = place;
  return h("g", { key: "second" },
    text(box.x, box.y - 9, h("tspan", { class: "mono strong" }, "queue · documents")),
    frame(box, "box queue"), text(box.x + 14, box.y + 42, say("messages_ready", { n: told.ready }), { class: "strong" }),
    frame(printer, "box"), text(printer.x + 14, printer.y + 30, say("generator"), { class: "strong" }),
    text(printer.x + 14, printer.y + 56, told.printing ? say("writes") : say("state_waiting"), { class: "soft" }),
    frame(letters, "box"), text(middle(letters).x, letters.y + 28, say("letters"), { class: "strong mid" }),
    text(middle(letters).x, letters.y + 66, number(told.count), { class: "huge mid" }));
}

// --- consumers -------------------------------------------------------------------------------------------------------

function consumer(one, box, ask, options) {
  const gone = one.state === "killed" || one.state === "crashed";
  const size = box.h >= 86 ? "full" : box.h >= 64 ? "medium" : "small";
  const name = one.guest ? say("guest") : say(size === "small" ? "consumer_short" : "consumer_n", { n: one.number });
  const kind = gone ? "box gone" : one.over ? "box zombie" : one.state === "paused" ? "box paused" : one.holds ? "box working" : "box";
  const controls = gone || one.guest || options.still || one.state === "leaving" ? null : buttons(one, box, size, ask);
  return h("g", { key: `consumer-${one.number}`, class: "consumer", "data-consumer": one.number, "data-state": one.state },
    frame(box, kind),
    text(box.x + 14, box.y + (size === "small" ? box.h / 2 + 6 : 23), name, { class: "name" }),
    size === "full" || (size === "medium" && gone) ? text(box.x + 14, box.y + 43, told(one), { class: gone || one.over || one.fails ? "bad" : "soft" }) : null,
    gone ? cross(box.x + box.w - 34, box.y + box.h / 2) : hand(one, box),
    controls);
}

function told(one) {
  if (one.over) return say("over");
  if (one.holds?.once) return say("once");
  if (one.holds?.paid) return say("paid_unacked");
  if (one.holds?.paying) return say("paying");
  if (one.fails && !one.holds) return say("fails");
  if (one.holds && one.state === "working") return say("works", { n: one.holds.attempt });
  return say(`state_${one.state}`);
}

// What is left of the lease, along the lower edge of the card.
function hand(one, box) {
  if (!one.holds || one.left === null) return null;
  const share = Math.max(0, Math.min(1, one.left / one.lease));
  const track = { x: box.x + 10, y: box.y + box.h - 8, height: 4, rx: 2 };
  return h("g", { class: "lease" }, h("title", {}, say("lease_left", { s: one.left.toFixed(1) })),
    h("rect", { ...track, width: box.w - 20, class: "track" }), h("rect", { ...track, width: (box.w - 20) * share, class: share < 0.25 ? "hand low" : "hand" }));
}

const cross = (x, y) => h("path", { class: "cross", d: `M${x - 10},${y - 10} L${x + 10},${y + 10} M${x + 10},${y - 10} L${x - 10},${y + 10}` });

const ICONS = {
  kill: "M-6,-6 L6,6 M6,-6 L-6,6",
  pause: "M-4,-6 V6 M4,-6 V6",
  resume: "M-4,-7 L7,0 L-4,7 Z",
  slow: "M-7,4 A8,8 0 0 1 7,4 M0,4 L-4,-2",
  fail: "M0,-7 V2 M0,6 V7",
};

// Pixels of a button and of the gap behind it. On a medium card all of them stand beside the claim in hand.
const WIDE = { full: [78, 6], medium: [74, 4] };
const PLAIN = { full: [38, 6], medium: [30, 4], small: [34, 3] };

function buttons(one, box, size, ask) {
  const paused = one.state === "paused";
  const all = [
    { key: "kill", word: say("kill"), wide: true, act: "kill" },
    { key: paused ? "resume" : "pause", word: say(paused ? "resume" : "pause"), act: paused ? "resume" : "pause" },
    { key: "slow", word: say("slow"), act: "slow", on: one.slow },
    { key: "fail", word: say("fail"), act: "fail", on: one.fails },
  ].slice(0, size === "small" ? 2 : 4);
  const tall = Math.min(28, box.h - 4);
  const y = size === "small" ? box.y + (box.h - tall) / 2 : box.y + box.h - tall - (size === "full" ? 12 : 9);
  let x = size === "small" ? box.x + 116 : box.x + 12;
  return all.map((button) => {
    const isWide = button.wide && size !== "small";
    const [w, gap] = isWide ? WIDE[size] : PLAIN[size];
    const at = { x, y };
    x += w + gap;
    return control(button, at, w, tall, isWide, () => ask({ do: button.act, consumer: one.number }), one.number);
  });
}

function control(button, at, w, tall, isWide, act, consumerNumber) {
  const pressed = button.on === undefined ? null : String(Boolean(button.on));
  return h("g", {
    class: `control ${button.key}${button.on ? " on" : ""}`, role: "button", tabindex: 0, "aria-pressed": pressed,
    "aria-label": say("control", { what: button.word, n: consumerNumber }), "data-act": button.act, onclick: once(act),
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); act(); } },
  },
  isWide ? null : h("title", {}, button.word),
  h("rect", { x: at.x, y: at.y, width: w, height: tall, rx: 8 }),
  h("path", { class: "icon", d: ICONS[button.key], transform: `translate(${at.x + (isWide ? 16 : w / 2)} ${at.y + tall / 2})` }),
  isWide ? text(at.x + 30, at.y + 20, button.word) : null);
}

// The second click of a double click does nothing: it was meant for what stood there before.
const once = (act) => (event) => { if (event.detail < 2) act(); };

// --- claims ----------------------------------------------------------------------------------------------------------

function chips(scene, place, shown, ask, options) {
  const born = { x: place.producer.x + place.producer.w - CHIP.w, y: middle(place.producer).y - CHIP.h / 2 };
  const exit = { x: place.queue.x + place.queue.w - CHIP.w, y: middle(place.queue).y - CHIP.h / 2 };
  const paid = place.isWide ? { x: place.done.x - CHIP.w / 2, y: middle(place.done).y - CHIP.h / 2 } : { x: middle(place.done).x, y: place.done.y - CHIP.h };
  const found = new Map();
  const put = (key, chip, at, kind = "", from = born) => { if (at && !found.has(key)) found.set(key, { key, chip, at: { x: at.x, y: at.y, from }, tall: at.tall ?? CHIP.h, kind }); };
  shown.forEach((one, at) => {
    const box = place.consumers[at];
    if (!one.holds) return;
    const tall = Math.min(CHIP.h, box.h - 4);
    const spot = { x: box.x + box.w - 12 - CHIP.w, y: box.h < 64 ? box.y + (box.h - tall) / 2 : box.y + 8, tall };
    put(one.over ? `${one.holds.id}-z` : one.holds.id, one.holds, spot, one.over ? " zombie" : " held");
  });
  if (scene.queue) {
    const spots = queueSlots(place.queue);
    scene.queue.waiting.slice(0, spots.length).forEach((chip, at) => put(chip.id, chip, spots[at], chip.locked ? " locked" : ""));
    row(place.delayed, 2).forEach((spot, at) => scene.queue.late[at] && put(scene.queue.late[at].id, scene.queue.late[at], spot, " delayed", exit));
    row(place.dead, 2).forEach((spot, at) => scene.queue.letters[at] && put(scene.queue.letters[at].id, scene.queue.letters[at], spot, " dead", exit));
  }
  const spots = place.isWide ? grid(place.done) : row({ ...place.done, w: place.done.w + 46 }, DONE_MAX, 66);
  scene.done.slice(0, spots.length).forEach((chip, at) => put(chip.id, chip, spots[at], chip.times > 1 ? " doubled" : " done", paid));
  if (scene.documents) notes(scene.documents, place, put);
  return [...found.values()].sort((a, b) => (a.key < b.key ? -1 : 1)).map((one) => draw(one, scene, ask, options));
}

function notes(told, place, put) {
  const spots = slots(place.second, 17, 10);
  const from = { x: place.printer.x, y: place.done.y + place.done.h - CHIP.h };
  told.waiting.slice(0, spots.length - 1).forEach((note, at) => put(note.id, note, spots[at], " note", from));
  if (told.printing) put(`note-${told.printing}`, { claim: told.printing }, { x: place.printer.x + place.printer.w - CHIP.w - 14, y: place.printer.y + 20 }, " note", from);
}

// Chips in the lower line of a tray, from its left; and in the box of what is done on a phone.
function row(box, count, top = 25) {
  const fits = Math.max(1, Math.min(count, Math.floor((box.w - 66) / (CHIP.w + 6))));
  return Array.from({ length: fits }, (_, at) => ({ x: box.x + 10 + at * (CHIP.w + 6), y: box.y + top }));
}

function grid(box) {
  const rows = Math.max(0, Math.floor((box.h - 104) / (CHIP.h + 6)));
  return Array.from({ length: rows * 2 }, (_, at) => ({ x: box.x + (box.w - 2 * CHIP.w - 6) / 2 + (at % 2) * (CHIP.w + 6), y: box.y + 102 + Math.floor(at / 2) * (CHIP.h + 6) }));
}

function draw(one, scene, ask, options) {
  const { chip, tall } = one;
  const again = chip.again || chip.attempt > 1 ? " again" : "";
  const policy = options.grouped && chip.policy ? LETTERS[[12, 27, 33, 48, 56, 71].indexOf(chip.policy)] ?? "" : "";
  const label = `${chip.claim || "?"}${policy}`;
  return h("g", {
    key: one.key, class: `chip${one.kind}${again}${options.hero === chip.claim ? " hero" : ""}`, at: one.at, "data-claim": chip.claim,
    onclick: () => options.follow?.(chip.claim),
  },
  h("title", {}, chip.policy === null ? say("claim_n", { n: chip.claim }) : say("chip", { n: chip.claim, policy: chip.policy ?? "" })),
  h("rect", { width: CHIP.w, height: tall, rx: 9 }),
  h("text", { x: CHIP.w / 2, y: tall / 2 + 7, class: policy || label.length > 3 ? "mid tight" : "mid" }, label),
  chip.locked ? h("path", { class: "lock", d: "M35,-3 v-3 a5,5 0 0 1 10,0 v3 m-11,0 h12 v9 h-12 z" }) : null,
  chip.times > 1 ? h("g", { class: "times" }, h("circle", { cx: CHIP.w - 4, cy: 5, r: 11 }), h("text", { x: CHIP.w - 4, y: 11, class: "mid" }, String(chip.times))) : null);
}
