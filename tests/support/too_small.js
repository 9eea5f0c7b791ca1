// The texts of less than 14 pixels, and on the stage of less than 16, as they are on the screen.
() => {
  const found = [];
  const walker = document.createTreeWalker(document.getElementById("page"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("title, .sr-only")) continue;
    const svg = parent.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / (svg.viewBox.baseVal.width || svg.clientWidth) : 1;
    const size = parseFloat(getComputedStyle(parent).fontSize) * scale;
    const least = parent.closest(".stage") ? 16 : 14;
    if (size < least - 0.1) found.push(`${size.toFixed(1)} px: ${node.data.trim().slice(0, 40)}`);
}
return [...new Set(found)];
}
