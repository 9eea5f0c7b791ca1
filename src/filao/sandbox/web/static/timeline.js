// Who held which claim, from when to when: a lane for each consumer, a bar with its number for each attempt, scaled to the step.

import { h } from "./dom.js";
import { number, say, seconds } from "./say.js";

const BAR_LEAST = 36; // pixels, so that every bar carries its number
const SHORTEST = 0.25; // seconds: bars that are shorter do not stretch the time any more
const DIGIT = 10; // pixels of a figure of a number
const PAD = 8; // pixels before and behind a number
const MARK = 22; // pixels of the mark of an end
const PUSHED_MAX = 90; // pixels that short bars push those behind them, so that each holds its number
const SLIVER = 6; // pixels of the shortest bar without one
const LEASE_END = 130; // pixels of a bar before its lease's end that hold its number and these words
const LEASE_WORDS = 90; // pixels of these words
const LANES_MAX = 7;
const LANE_LEAST = 20; // pixels of a lane's height
const AXIS = 26; // pixels above and below the lanes
const LOW = 26; // pixels of a lane, below which its numbers are smaller
const LEAST = 5; // seconds that are drawn
const CUT = 10; // seconds that are cut off at once before the oldest bar
const RESTS = 2; // seconds that are drawn after the last bar, at most: while nothing happens, the time of the step stands still
const REST = 0.25; // of the room is what they take at most, so that the last bars are in sight on a phone
const GLYPHS = {
  acked: "M-5,0 L-1,4 L6,-5",
  settled: "M-5,0 L-1,4 L6,-5",
  nacked: "M6,4 V2 a4,4 0 0 0 -4,-4 H-4 M-1,-6 L-5,-2 L-1,2",
  released: "M6,4 V2 a4,4 0 0 0 -4,-4 H-4 M-1,-6 L-5,-2 L-1,2",
  killed: "M-5,-5 L5,5 M5,-5 L-5,5",
  failed: "M-5,-5 L5,5 M5,-5 L-5,5",
  dead: "M0,-7 V7 M-5,-2 H5",
  refused: "M-4,4 L4,-4 M-6,0 a6,6 0 1 0 12,0 a6,6 0 1 0 -12,0",
};
export const PAID = "M0,-6 L6,0 L0,6 L-6,0 Z";

// The drawing keeps its size while time goes on, and stands out of it to the right: a new size would lay out every bar anew.
// `options.bars` is how many bars of a lane are drawn, its last.
export function timeline(told, width, height, options) {
  const lanes = shown(told.lanes, Math.min(LANES_MAX, Math.floor((height - AXIS) / LANE_LEAST)));
  if (!lanes.length) return h("p", { class: "soft pad" }, say("timeline_none"));
  const bars = lanes.flatMap((lane) => lane.bars.map((bar) => ({ ...bar, lane: lane.number })));
  const begin = bars.length ? Math.floor(Math.min(...bars.map((bar) => bar.from)) / CUT) * CUT : 0;
  const isAtRest = bars.length && bars.every((bar) => bar.to !== null);
  const last = isAtRest ? Math.max(...bars.map((bar) => bar.to)) : Infinity;
  const drawnTo = Math.max(0.1, Math.min(told.now, last + RESTS));
  const lengths = bars.map((bar) => Math.max(SHORTEST, (bar.to ?? drawnTo) - bar.from));
  const wanted = lengths.length ? BAR_LEAST / Math.min(...lengths) : 0;
  const [label, named] = width < 500 ? [92, "consumer_short"] : [172, "consumer_n"];
  const room = width - label - 20;
  const scale = Math.max(room / Math.max(LEAST, (drawnTo - begin) * 1.04), Math.min(wanted, 144));
  const now = Math.min(drawnTo, last + (REST * room) / scale);
  const end = begin + Math.max((now - begin) * 1.04, room / scale);
  const x = (at) => 4 + (at - begin) * scale;
  const spread = (isTicked) => new Map(lanes.flatMap((lane) => spansOf(lane.bars, x, now, isTicked)));
  const ticked = spread(true);
  const isTicked = [...ticked.values()].every((span) => !span.isCut);
  const spans = isTicked ? ticked : spread(false);
  const isPaid = bars.every((bar) => bar.paid === null || paidIn(bar, spans.get(keyOf(bar)), x) !== null);
  const full = Math.max(room, (end - begin) * scale, ...[...spans.values()].map((span) => span.to)) + 20;
  const tall = Math.max(LANE_LEAST, Math.min(46, (height - AXIS) / Math.max(1, lanes.length)));
  const y = new Map(lanes.map((lane, at) => [lane.number, 6 + at * tall]));
  const bottom = 6 + lanes.length * tall;
  const grown = (value) => `${value * options.scale}px`;
  return h("div", { class: "timeline-box" },
    h("div", { class: "lane-names", style: `width:${grown(label)}` }, lanes.map((lane) => h("span", { style: `top:${grown(y.get(lane.number) + tall / 2)}` },
      lane.guest ? say("guest") : say(named, { n: lane.number })))),
    h("div", { class: "timeline", tabindex: 0, role: "group", "aria-label": say("timeline"), style: `left:${grown(label)}`, onscroll: options.onscroll },
      h("div", { class: "extent", style: `width:${grown(full)}` }),
      h("svg", { width: room * options.scale, height: (bottom + 24) * options.scale, viewBox: `0 0 ${room} ${bottom + 24}` },
        ticks(begin, end, scale).map((at) => h("g", { key: `t${at}`, class: "tick" },
          h("line", { x1: x(at), x2: x(at), y1: 2, y2: bottom }), h("text", { x: x(at), y: bottom + 18, class: at > begin ? "mid" : "start" }, `${number(at)}\u00a0s`))),
        h("line", { key: "now", class: "now", x1: x(now), x2: x(now), y1: 0, y2: bottom }),
        joins(bars).map(([one, next]) => join(one, next, spans, y, tall, options)),
        lanes.map((lane) => h("g", { key: `l${lane.number}` }, lane.bars.slice(-options.bars).map((bar) => drawn(bar, spans.get(keyOf(bar)), x, y.get(lane.number), tall, { ...options, full, isTicked, isPaid })))))));
}

const keyOf = (bar) => `${bar.id}-${bar.from}`;
const figures = (bar) => String(bar.claim || "?").length * DIGIT;
const isDone = (bar) => bar.how === "acked" || bar.how === "settled";

// Where in its bar a payment is marked, before the mark of the end; null without room behind the number.
function paidIn(bar, { from, to }, x) {
  const at = Math.min(x(bar.paid), to - (GLYPHS[bar.how] ? 27 : 10));
  return at > from + figures(bar) + 2 * PAD ? at : null;
}

// Where the bars of a lane are drawn: each holds its number, and a consumer's death its mark, and begins behind the one
// before. For these it ends later than it did, or began earlier where a consumer died, because others take over at once.
// In a burst that would lead too far from the time, and bars are as long as they were, with or without a number.
// The tick of an acknowledgement stands in all bars that ended so, or in none: one without it would look unacknowledged.
// So does the mark of a payment.
function spansOf(bars, x, now, isTicked) {
  let free = -Infinity;
  return bars.map((bar) => {
    const [begins, ends] = [x(bar.from), x(bar.to ?? now)];
    const room = figures(bar) + 2 * PAD + (bar.how === "killed" || (isTicked && GLYPHS[bar.how]) ? MARK : 0);
    const from = Math.max(bar.how === "killed" ? Math.min(begins, Math.max(0, ends - room)) : begins, free);
    const isCut = from + room - ends > PUSHED_MAX;
    free = Math.max(ends, from + (isCut ? SLIVER : room));
    return [keyOf(bar), { from, to: free, isCut }];
  });
}

// The lanes in which something happened, first of all those of the living, who have taken over from the dead; then idle ones.
function shown(all, most) {
  const lives = (lane) => !["gone", "killed", "crashed"].includes(lane.state);
  const busy = all.filter((lane) => lane.bars.length);
  const idle = all.filter((lane) => !lane.bars.length && lives(lane));
  const kept = [...busy.filter(lives), ...busy.filter((lane) => !lives(lane)).reverse(), ...idle].slice(0, most);
  return all.filter((lane) => kept.includes(lane));
}

function ticks(begin, end, scale) {
  const step = [1, 2, 5, 10, 20, 30, 60, 120, 300].find((each) => each * scale >= 90) ?? 600;
  const first = Math.ceil(begin / step);
  return Array.from({ length: Math.floor(end / step) - first + 1 }, (_, at) => (first + at) * step);
}

function drawn(bar, { from, to }, x, y, tall, options) {
  const w = to - from;
  const how = bar.how || "running";
  const middle = y + tall / 2;
  const glyph = GLYPHS[bar.how];
  const digits = figures(bar);
  const fits = options.isTicked || (!isDone(bar) && w > digits + PAD + MARK - 1); // beside the number
  // Without the mark of its end a bar has none of its payment either: it would look paid and not acknowledged.
  const paidAt = options.isPaid && bar.paid !== null && (fits || !glyph) ? paidIn(bar, { from, to }, x) : null;
  return h("g", {
    key: keyOf(bar), class: `bar ${how}${tall < LOW ? " low" : ""}${bar.attempt > 1 ? " again" : ""}${options.claim === bar.claim ? " hero" : ""}`,
    onclick: () => options.follow(bar.claim), "data-claim": bar.claim, "data-how": how,
  },
  h("title", {}, about(bar)),
  h("rect", { x: from, y: y + 2, width: w, height: tall - (tall < LOW ? 3 : 5), rx: 7 }),
  bar.extended.filter((at) => x(at) < to).map((at) => h("line", { class: "extended", x1: x(at), x2: x(at), y1: y + tall - 10, y2: y + tall - 4 })),
  w < digits + PAD ? null : h("text", { x: from + PAD, y: middle + 5 }, String(bar.claim || "?")),
  paidAt !== null ? h("path", { class: "paid", d: PAID, transform: `translate(${paidAt} ${middle - 1})` }) : null,
  glyph && fits ? h("path", { class: "glyph", d: glyph, transform: `translate(${to - 12} ${middle - 1})` }) : null,
  bar.lease_end !== null ? leaseEnd(x(bar.lease_end), from, to, y, tall, options) : null);
}

// Its words stand beside it: before it within the bar, or behind it where the bar ends there or is long enough.
function leaseEnd(at, from, to, y, tall, options) {
  const behind = (to - at > MARK ? at : Math.max(to, at)) + 5;
  const isFree = to - at > MARK ? to - at > LEASE_WORDS + 2 * MARK : behind + LEASE_WORDS < options.full;
  const place = at - from > LEASE_END ? { x: at - 5, class: "before" } : isFree ? { x: behind } : null;
  return h("g", { class: "lease-end" }, h("title", {}, say("lease_end")), h("line", { x1: at, x2: at, y1: y - 1, y2: y + tall }),
    place && h("text", { ...place, y: y + tall / 2 + 5 }, say("lease_end")));
}

function about(bar) {
  const until = bar.to === null ? say("still") : seconds(bar.to);
  const how = bar.together ? say("how_together") : say(`how_${bar.how || "running"}`);
  return say("bar", { claim: bar.claim, attempt: bar.attempt, from: seconds(bar.from), to: until, how });
}

function joins(bars) {
  const byClaim = new Map();
  for (const bar of bars) byClaim.set(bar.id, [...(byClaim.get(bar.id) ?? []), bar]);
  return [...byClaim.values()].flatMap((all) => {
    const sorted = all.sort((a, b) => a.from - b.from);
    return sorted.slice(1).map((next, at) => [sorted[at], next]);
  });
}

// From the end of one bar, out of its edge where the other lies in another lane, to the beginning of the other.
function join(one, next, spans, y, tall, options) {
  const right = { x: spans.get(keyOf(next)).from, y: y.get(next.lane) + tall / 2 };
  const side = Math.sign(y.get(next.lane) - y.get(one.lane));
  const left = { x: Math.min(spans.get(keyOf(one)).to, right.x) - Math.abs(side) * PAD, y: y.get(one.lane) + tall / 2 + side * (tall / 2 - 3) };
  const bend = Math.max(18, (right.x - left.x) / 2);
  const out = side ? `${left.x},${left.y + side * bend}` : `${left.x + bend},${left.y}`;
  return h("g", { key: `j${next.id}-${next.from}`, class: `join${options.claim === one.claim ? " hero" : ""}` },
    h("path", { d: `M${left.x},${left.y} C${out} ${right.x - bend},${right.y} ${right.x},${right.y}` }));
}
