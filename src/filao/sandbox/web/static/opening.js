// The opening: what this is, in one sentence and in the chapter's own diagram, which is alive.

import { h } from "./dom.js";
import { say } from "./say.js";
import { stage } from "./stage.js";

const CLAIMS = 9;

export function opening(start) {
  return h("main", { class: "opening", id: "stage" },
    h("h1", {}, say("opening_title")),
    h("p", { class: "objective" }, say("objective")),
    innerWidth < 820 ? still() : diagram(),
    h("ol", { class: "stages big", "aria-label": say("six_stages") }, [0, 1, 2, 3, 4, 5].map((one) => h("li", { class: "past" }, h("span", {}, say(`stage_${one}`)), h("small", {}, say(`stage_${one}_does`))))),
    h("div", { class: "begin" }, h("button", { class: "act start", onclick: start }, say("start")), h("p", { class: "soft" }, say("opening_real"))));
}

function diagram() {
  const box = (x, y, w, tall, kind, title, about) => h("g", {}, h("rect", { x, y, width: w, height: tall, rx: 14, class: kind }),
    h("text", { x: x + w / 2, y: y + (about ? tall / 2 - 2 : tall / 2 + 7), class: "strong mid" }, title), about ? h("text", { x: x + w / 2, y: y + tall / 2 + 22, class: "soft mid" }, about) : null);
  const path = (d, kind = "") => h("path", { d, class: `flow${kind}` });
  return h("svg", { class: "stage diagram", viewBox: "0 0 1080 268", role: "img", "aria-label": say("diagram") },
    path("M170,134 H244"), path("M652,134 C720,134 690,46 764,46"), path("M652,134 H764"), path("M652,134 C720,134 690,222 764,222"),
    h("path", { class: "arrow", d: "M232,122 L246,134 L232,146" }), [46, 134, 222].map((y) => h("path", { class: "arrow", d: `M752,${y - 12} L766,${y} L752,${y + 12}` })),
    box(0, 84, 170, 100, "box", say("producer"), say("portal")),
    h("rect", { x: 250, y: 60, width: 402, height: 148, rx: 14, class: "box queue" }),
    h("text", { x: 451, y: 46, class: "mono strong mid" }, "queue · claims.processing"), h("text", { x: 451, y: 196, class: "soft mid" }, say("fifo_long")),
    Array.from({ length: 5 }, (_, at) => h("rect", { x: 296 + at * 69, y: 104, width: 54, height: 46, rx: 10, class: "slot" })),
    [0, 1, 2].map((one) => h("g", {}, h("rect", { x: 770, y: 12 + one * 88, width: 310, height: 68, rx: 14, class: "box" }), h("text", { x: 788, y: 54 + one * 88, class: "strong" }, say("consumer_n", { n: one + 1 })))),
    claims().map((at) => h("g", { key: at, class: `travels to-${(CLAIMS - 1 - at) % 3}`, style: `animation-delay:${-at * 1.6 - shift()}s` }, h("rect", { width: 54, height: 46, rx: 10 }), h("text", { x: 27, y: 31, class: "mid" }, String(CLAIMS - at)))));
}

// The first claim is the farthest on its way. Where nothing may move, all stand still at a moment at which none is between two boxes.
const isStill = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const shift = () => (isStill() ? 0.48 : 0);
const claims = () => Array.from({ length: CLAIMS }, (_, at) => at).slice(isStill() ? 1 : 0);

// On a phone: the stage itself, with claims that wait and claims in hand.
function still() {
  const chip = (claim) => ({ id: `still-${claim}`, claim, policy: null });
  const scene = {
    producer: { sent: 9, answer_ms: null, refused: 0 }, documents: null, done: [chip(2), chip(1)], processed: 2, cents: null,
    queue: { name: "claims.processing", waiting: [6, 7, 8, 9].map(chip), late: [], letters: [], ready: 4, delayed: 0, dead: 0, oldest: 0 },
    consumers: [1, 2, 3].map((number) => ({ number, state: "working", holds: { ...chip(number + 2), attempt: 1 }, left: null, lease: 1 })),
  };
  return h("div", { class: "view" }, stage(scene, Math.min(innerWidth, document.documentElement.clientWidth) - 30, 0, () => {}, { still: true }));
}
