// Slow motion: what has happened in the step, one stage of one claim's life at a time, with its row on the disk before and after.

import { h } from "./dom.js";
import { say, seconds } from "./say.js";

const STAGES = { sent: [0, 1], received: [2, 3], paying: [3], handled: [3], acked: [4, 5], nacked: [1], dead: [1], killed: [1], released: [1], refused: [4], failed: [5], lost: [3] };
const STAGES_ONCE = { ...STAGES, killed: [5], acked: [5] }; // received at most once, a claim is acknowledged and gone before the work
const TOLD_ONCE = ["received", "handled", "killed", "acked"];

const made = new WeakMap();

// Each frame is one stage of one move. A drawing asks for them several times: they are made once.
export function frames(moves) {
  if (!made.has(moves)) made.set(moves, framesOf(moves));
  return made.get(moves);
}

function framesOf(moves) {
  const rows = new Map();
  const once = new Set();
  const found = [];
  for (const move of fromTheirSend(moves)) {
    if (move.what === "received") once[move.row ? "delete" : "add"](move.id);
    const isOnce = once.has(move.id);
    const stages = (isOnce ? STAGES_ONCE : STAGES)[move.what];
    const before = rows.get(move.id) ?? "";
    const kept = ["killed", "dead"].includes(move.what) ? move.row || before : move.row;
    stages?.forEach((stage, at) => {
      const isFirst = at === 0 && stages.length > 1 && move.what !== "received";
      found.push({ ...move, stage, before, after: isFirst ? before : kept, once: isOnce, last: at === stages.length - 1 });
    });
    rows.set(move.id, kept);
  }
  return found;
}

// The portal writes a send down when it has the receipt; by then a quick consumer may have the claim, and its send came before.
function fromTheirSend(moves) {
  const sends = new Map(moves.filter((move) => move.what === "sent").map((move) => [move.id, move]));
  const begun = new Set();
  return moves.flatMap((move) => {
    const send = sends.get(move.id);
    if (begun.has(move.id)) return move === send ? [] : [move];
    begun.add(move.id);
    return !send || send === move ? [move] : [{ ...send, at: move.at }, move];
  });
}

// The stage as it stood after a frame, computed from the frames up to there.
export function replayed(scene, shown) {
  const claims = new Map();
  const lanes = new Set();
  for (const frame of shown) {
    if (frame.lane > 0) lanes.add(frame.lane);
    claims.set(frame.id, after(claims.get(frame.id), frame));
  }
  const all = [...claims.values()];
  const chip = (one) => ({ id: one.id, claim: one.claim, policy: null, again: one.attempt > 1, attempt: one.attempt });
  const done = all.filter((one) => one.where === "gone" && one.paid);
  const waiting = all.filter((one) => one.where === "queue");
  const late = all.filter((one) => one.where === "delayed");
  const dead = all.filter((one) => one.where === "dead");
  return {
    frozen: false, documents: null,
    producer: { sent: all.length, answer_ms: null, refused: 0 },
    queue: { ...scene.queue, waiting: waiting.map(chip), late: late.map((one) => ({ ...chip(one), due: 0 })), letters: dead.map(chip), ready: waiting.length, delayed: late.length, dead: dead.length, oldest: 0 },
    consumers: [...lanes].sort((a, b) => a - b).slice(-6).map((lane) => {
      const held = all.find((one) => one.where === lane);
      return { number: lane, state: all.some((one) => one.killedBy === lane) ? "killed" : held ? "working" : "waiting", holds: held ? { ...chip(held), paid: held.paid > 0 } : null, left: null, lease: 1 };
    }),
    done: done.map((one) => ({ ...chip(one), times: one.paid })).reverse(),
    processed: done.length, cents: null,
  };
}

function after(before, frame) {
  const one = before ?? { id: frame.id, claim: frame.claim, paid: 0, attempt: 0, where: "queue", killedBy: 0 };
  const where = {
    received: frame.lane, handled: one.where, paying: one.where, acked: frame.last ? "gone" : one.where, nacked: "delayed", dead: "dead",
    killed: frame.once ? "gone" : "queue", released: "queue", refused: one.where, failed: "gone", sent: "queue", lost: one.where,
  }[frame.what];
  const killedBy = frame.what === "killed" ? frame.lane : one.killedBy;
  return { ...one, where, attempt: frame.attempt || one.attempt, paid: one.paid + (frame.what === "handled" ? 1 : 0), killedBy };
}

function wordOf(frame) {
  const isFirst = frame.stage === 0 || (!frame.last && ["acked", "received"].includes(frame.what));
  return `slow_${frame.what}${frame.once && TOLD_ONCE.includes(frame.what) ? "_once" : ""}${isFirst ? "_first" : ""}`;
}

export function slowPanel(all, at, state, go) {
  const frame = all[at];
  if (!frame) return h("p", { class: "soft pad" }, say("slow_nothing"));
  const move = (to, word, sign, off) => h("button", { class: "plain", "aria-label": word, title: word, disabled: off, onclick: () => go(to) }, sign);
  return h("div", { class: "slow" },
    h("div", { class: "slow-bar" },
      move(0, say("slow_first"), "|◀\ufe0e", at === 0), move(at - 1, say("slow_back"), "◀\ufe0e", at === 0),
      h("button", { class: "plain", "aria-pressed": String(state.playing), onclick: () => go("play") }, say(state.playing ? "slow_stop" : "slow_play")),
      move(at + 1, say("slow_on"), "▶\ufe0e", at >= all.length - 1), move(all.length - 1, say("slow_last"), "▶\ufe0e|", at >= all.length - 1),
      h("input", { type: "range", min: 0, max: all.length - 1, value: at, "aria-label": say("slow_where"), oninput: (event) => go(Number(event.target.value)) }),
      h("span", { class: "soft count" }, `${at + 1} / ${all.length}`)),
    h("p", { class: "slow-told" }, h("strong", {}, say(`stage_${frame.stage}`)), " · ",
      say(wordOf(frame), { claim: frame.claim, n: frame.lane, attempt: frame.attempt, at: seconds(frame.at, 2) })),
    rows(frame.before, frame.after));
}

function rows(before, after) {
  const [was, is] = [before, after].map((text) => (text ? JSON.parse(text) : null));
  const columns = Object.keys({ ...was, ...is });
  const cell = (row, other, name) => h("td", { class: row[name] !== other?.[name] ? "changed" : "", title: row[name] ?? "" }, short(row[name] ?? "–"));
  const line = (title, row, other) => h("tr", {}, h("th", { scope: "row" }, title),
    row ? columns.map((name) => cell(row, other, name)) : h("td", { class: "soft", colspan: Math.max(1, columns.length) }, say("no_row")));
  return h("div", { class: "rows" }, h("table", { class: "row" },
    h("thead", {}, h("tr", {}, h("td", {}), columns.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, line(say("before"), was, is), line(say("after"), is, was))));
}

const short = (value) => (value.length > 22 ? `${value.slice(0, 20)}…` : value);
