// Where everything stands on the stage: pure geometry, in the pixels of the page.

export const CHIP = { w: 46, h: 36 };
const GAP = 8;
const CROWD = 5; // consumers, from which their cards stand closer to each other
export const CARD = 250;

export function boxes(width, height, consumers, documents) {
  return width >= 820 ? wide(width, height, consumers, documents) : narrow(width, consumers, documents);
}

function wide(width, height, consumers, documents) {
  const room = documents ? height - 104 : height;
  const doneX = width - 118;
  const consumerX = doneX - 26 - CARD;
  const top = documents ? 26 : 30;
  const queue = { x: 160, y: top, w: consumerX - 54 - 160, h: room - top - 74 };
  const trayW = (queue.w - GAP) * 0.42;
  const gap = consumers < CROWD ? GAP : GAP / 2;
  const each = Math.min(104, (room - gap * (Math.max(1, consumers) - 1)) / Math.max(1, consumers));
  const all = each * consumers + gap * (consumers - 1);
  const first = Math.max(0, (room - all) / 2);
  const above = isLow(queue) ? 26 : 0; // a low queue is too low for the producer's three lines
  return {
    isWide: true, width, height,
    producer: { x: 0, y: queue.y - above, w: 124, h: Math.min(176, queue.h + above) },
    queue,
    delayed: { x: queue.x, y: room - 66, w: trayW, h: 66 },
    dead: { x: queue.x + trayW + GAP, y: room - 66, w: queue.w - trayW - GAP, h: 66 },
    consumers: Array.from({ length: consumers }, (_, place) => ({ x: consumerX, y: first + place * (each + gap), w: CARD, h: each })),
    done: { x: doneX, y: 0, w: 118, h: room },
    second: documents && { x: queue.x, y: height - 70, w: queue.w, h: 70 },
    printer: documents && { x: consumerX, y: height - 76, w: CARD, h: 76 },
    letters: documents && { x: doneX, y: height - 92, w: 118, h: 92 },
  };
}

function narrow(width, consumers, documents) {
  const queue = { x: 0, y: 116, w: width, h: 168 };
  const trayW = (width - GAP) / 2;
  const each = 104;
  let y = queue.y + queue.h + GAP + 66 + 18;
  const places = Array.from({ length: Math.max(1, consumers) }, (_, place) => ({ x: 0, y: y + place * (each + GAP), w: width, h: each }));
  y += places.length * (each + GAP) + 8;
  const done = { x: 0, y, w: width, h: 112 };
  y += 112 + 12;
  const result = {
    isWide: false, width,
    producer: { x: 0, y: 0, w: width, h: 76 },
    queue,
    delayed: { x: 0, y: queue.y + queue.h + GAP, w: trayW, h: 66 },
    dead: { x: trayW + GAP, y: queue.y + queue.h + GAP, w: trayW, h: 66 },
    consumers: places.slice(0, consumers), done,
  };
  if (documents) {
    result.second = { x: 0, y: y + 28, w: width, h: 70 };
    result.printer = { x: 0, y: y + 110, w: width, h: 76 };
    result.letters = { x: 0, y: y + 198, w: width, h: 92 };
    y += 300;
  }
  return { ...result, height: y };
}

// The places of chips in a box, the first of them at its right end, as what goes next stands beside the exit.
export function slots(box, top, bottom) {
  const columns = Math.max(1, Math.floor((box.w - 16) / (CHIP.w + 6)));
  const rows = Math.max(1, Math.floor((box.h - top - bottom + 6) / (CHIP.h + 6)));
  const right = box.x + box.w - 10 - CHIP.w;
  return Array.from({ length: columns * rows }, (_, place) => ({
    x: right - (place % columns) * (CHIP.w + 6),
    y: box.y + top + Math.floor(place / columns) * (CHIP.h + 6),
  }));
}

// A low box has its words in one line, above one row of chips.
export const isLow = (box) => box.h < 112;
export const queueSlots = (box) => (isLow(box) ? slots(box, 32, 2) : slots(box, 44, 34));

export const middle = (box) => ({ x: box.x + box.w / 2, y: box.y + box.h / 2 });

export function pipe(from, to) {
  const bend = (from.x + to.x) / 2;
  return `M${from.x},${from.y} C${bend},${from.y} ${bend},${to.y} ${to.x},${to.y}`;
}
