// The live part of a page: drawn by the server, put in its place here. Without this script the page stands still.
"use strict";

const part = document.querySelector("[data-live]");
const STREAMS = 3; // a browser has six connections to a server for all its tabs; who gets no stream asks now and then
const ASKS_EVERY = 5000; // milliseconds
const NARROWS = 1000; // milliseconds between two attempts to get a stream
const STALE = 10000; // milliseconds without an answer after which the page says so
const SILENCE = 60000; // milliseconds after which a connection counts as broken: a stream ends after 30 seconds

const silent = document.getElementById("silent");
let heard = Date.now();
let lost = 0; // since when nobody answers
let held = null; // what came while something was pressed: replaced before it is let go, a button would do nothing

function hear() {
  heard = Date.now();
  lost = 0;
  silent.hidden = true;
}

function lose() {
  lost ||= Date.now();
}

function watch() {
  if (document.hidden) { lost = 0; return; }
  if (Date.now() - heard > SILENCE) lose();
  if (!lost || Date.now() - lost < STALE) return;
  silent.querySelector("time").textContent = new Date(heard).toLocaleTimeString(document.documentElement.lang);
  silent.hidden = false;
}

function draw(text) {
  if (part.matches(":active")) { held = text; return; }
  held = null;
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
    let opened = false; // a dashboard that has no stream left refuses it
    const end = () => { events.close(); done(opened); };
    events.onopen = () => { opened = true; hear(); };
    events.onmessage = (event) => { hear(); draw(event.data); };
    events.onerror = () => { lose(); if (events.readyState === EventSource.CLOSED) end(); };
    document.addEventListener("visibilitychange", () => { if (document.hidden) end(); }, { once: true });
  });
}

async function ask() {
  try {
    const answer = await fetch(part.dataset.live.replace("live=stream", "live=once"));
    if (!answer.ok) { lose(); return; }
    draw(await answer.text());
    hear();
  } catch {
    lose(); // it is asked again
  }
}

function seen() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
}

async function live() {
  for (;;) {
    await seen();
    let tried = false;
    let streamed = false;
    for (let place = 0; place < STREAMS && !tried; place += 1) {
      await navigator.locks?.request(`filao-live-${place}`, { ifAvailable: true }, async (lock) => {
        if (lock) { tried = true; streamed = await listen(); }
      });
    }
    if (!streamed && !document.hidden) await ask();
    await new Promise((done) => setTimeout(done, streamed ? NARROWS : ASKS_EVERY));
  }
}

if (part) {
  for (const end of ["pointerup", "pointercancel", "keyup"]) {
    addEventListener(end, () => setTimeout(() => { if (held !== null) draw(held); })); // behind the click
  }
  live();
  setInterval(watch, 1000); // milliseconds
}
