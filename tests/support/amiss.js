// What is amiss on the page as it is shown now: too wide, too high, below the fold, cut. A list of sentences.
() => {
  const found = [];
  const body = document.querySelector(".lesson-body");
  const wide = innerWidth > 1100;
  if (document.documentElement.scrollWidth > innerWidth) found.push(`the page is ${document.documentElement.scrollWidth - innerWidth} px too wide`);
  if (wide && !document.querySelector(".paper") && document.documentElement.scrollHeight > innerHeight) found.push(`the page is ${document.documentElement.scrollHeight - innerHeight} px too high`);
  if (wide && body && body.scrollHeight > body.clientHeight + 1) found.push(`${body.scrollHeight - body.clientHeight} px of the lesson lie below the fold`);
  for (const part of document.querySelectorAll(".run, .outside > div")) {
    if (wide && part.scrollHeight > part.clientHeight + 1) found.push(`${part.scrollHeight - part.clientHeight} px beside the editor lie below the fold`);
  }
  for (const one of document.querySelectorAll("#page *")) {
    if (!["hidden", "clip"].includes(getComputedStyle(one).overflowX) || one.closest(".sr-only, .tabs, .mirror") || one.matches("textarea")) continue;
    if (one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 0) found.push(`cut: ${one.className || one.tagName} by ${one.scrollWidth - one.clientWidth} px`);
  }
  for (const svg of document.querySelectorAll("svg.stage, .timeline svg")) {
    const frame = svg.getBoundingClientRect();
    const scrolls = svg.closest(".timeline") !== null; // to the left and to the right, with what is drawn
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      const beside = !scrolls && (box.right > frame.right + 2 || box.left < frame.left - 2);
      if (box.width && (beside || box.bottom > frame.bottom + 2 || box.top < frame.top - 3)) found.push(`outside its drawing: ${text.textContent}`);
    }
  }
  for (const group of document.querySelectorAll("svg.stage g")) {
    const rect = group.querySelector(":scope > rect.box");
    if (!rect || group.querySelectorAll(":scope > rect.box").length > 1) continue;
    const frame = rect.getBoundingClientRect();
    for (const text of group.querySelectorAll(":scope > text")) {
      const box = text.getBoundingClientRect();
      if (box.top > frame.top && box.bottom < frame.bottom + 8 && (box.right > frame.right + 1 || box.left < frame.left - 1)) found.push(`wider than its box: ${text.textContent}`);
    }
  }
  return [...new Set(found)];
}
