// The live part of a page: drawn by the server, put in its place here. Without this script the page stands still.
"use strict";

const part = document.querySelector("[data-live]");
const STREAMS = 3; // a browser has six connections to a server for all its tabs; who gets no stream asks now and then
const ASKS_EVERY = 5000; // milliseconds
const NARROWS = 1000; // milliseconds between two attempts to get a stream

function draw(text) {
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  const open = new Map([...part.querySelectorAll("details")].map((one, place) => [place, one.open]));
  const scrolled = [...part.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
  part.innerHTML = text;
  part.querySelectorAll("details").forEach((one, place) => { if (open.has(place)) one.open = open.get(place); });
  part.querySelectorAll(".scroll").forEach((one, place) => { one.scrollLeft = scrolled[place] ?? 0; });
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

function listen() {
  return new Promise((done) => {
    const events = new EventSource(part.dataset.live);
    const end = () => { events.close(); done(); };
    events.onmessage = (event) => draw(event.data);
    events.onerror = () => { if (events.readyState === EventSource.CLOSED) end(); };
    document.addEventListener("visibilitychange", () => { if (document.hidden) end(); }, { once: true });
  });
}

async function ask() {
  try {
    const answer = await fetch(part.dataset.live.replace("live=stream", "live=once"));
    if (answer.ok) draw(await answer.text());
  } catch {
    // the server is away: it is asked again
  }
}

function seen() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
}

async function live() {
  for (;;) {
    await seen();
    let has = false;
    for (let place = 0; place < STREAMS && !has; place += 1) {
      await navigator.locks?.request(`filao-live-${place}`, { ifAvailable: true }, async (lock) => {
        if (lock) { has = true; await listen(); }
      });
    }
    if (!has) await ask();
    await new Promise((done) => setTimeout(done, has ? NARROWS : ASKS_EVERY));
  }
}

if (part) live();
