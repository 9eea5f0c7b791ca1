// A page as a function of what is known: `h` describes an element, `draw` brings the document to what is described.
// Children keep their element, wherever the others go, by their key or else by their place among what their parent was
// given, of which some may be nothing; so what moves can be animated, and what has the focus or is being pressed keeps it.

const SVG = "http://www.w3.org/2000/svg";

export const h = (tag, props, ...children) => ({ tag, props: props ?? {}, children: placed(children) });

export const draw = (parent, ...wanted) => bring(parent, placed(wanted));

// `describe`, called again only when one of its arguments is another: what is described as before is not gone through.
export function stayed(describe) {
  let before = [];
  let described;
  return (...told) => {
    if (!described || told.some((value, at) => value !== before[at])) [before, described] = [told, describe(...told)];
    return described;
  };
}

// The children that are something, each element with a key.
function placed(children, place = "@", found = []) {
  children.forEach((child, at) => {
    if (Array.isArray(child)) placed(child, `${place}${at}.`, found);
    else if (child === null || child === undefined || child === false) return;
    else if (typeof child === "object") found.push({ ...child, key: child.props.key ?? `${place}${at}` });
    else found.push(child);
  });
  return found;
}

function bring(parent, found) {
  if (!found.length && !parent.firstChild) return;
  const nodes = parent.childNodes;
  if (nodes.length === found.length && found.every((child, at) => isOf(nodes[at], child))) { // most of the time all are in their place
    found.forEach((child, at) => (typeof child === "object" ? refresh(nodes[at], child, false) : textNode(child, nodes[at])));
    return;
  }
  const tags = new Map(found.map((child) => [child.key, child.tag]));
  const keyed = new Map();
  for (const node of [...parent.childNodes]) {
    if (node.drawnKey === undefined) continue;
    if (tags.get(node.drawnKey) === node.localName) keyed.set(node.drawnKey, node);
    else node.remove();
  }
  let at = parent.firstChild;
  for (const child of found) {
    const node = typeof child === "object" ? element(parent, child, keyed) : textNode(child, at);
    while (node !== at && at?.nodeType === Node.TEXT_NODE) at = without(at); // what moves loses the focus
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  while (at) at = without(at);
}

const isOf = (node, child) => (typeof child === "object" ? node.drawnKey === child.key && node.localName === child.tag : node.nodeType === Node.TEXT_NODE);

function without(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}

function textNode(text, at) {
  const value = String(text);
  if (at?.nodeType !== Node.TEXT_NODE) return document.createTextNode(value);
  if (at.data !== value) at.data = value;
  return at;
}

function element(parent, wanted, keyed) {
  const known = keyed.get(wanted.key);
  const node = known ?? create(parent, wanted.tag);
  node.drawnKey = wanted.key;
  refresh(node, wanted, known === undefined);
  return node;
}

function refresh(node, wanted, isNew) {
  if (node.drawnChildren === wanted.children) return;
  update(node, wanted.props, isNew);
  bring(node, wanted.children);
  node.drawnChildren = wanted.children;
}

function create(parent, tag) {
  const inSvg = tag === "svg" || (parent.namespaceURI === SVG && parent.localName !== "foreignObject");
  const node = inSvg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  node.drawnProps = {};
  return node;
}

function update(node, props, isNew) {
  const before = node.drawnProps;
  for (const name of Object.keys(before)) if (!(name in props)) set(node, name, null, isNew);
  for (const [name, value] of Object.entries(props)) {
    if (before[name] !== value || name === "value" || name === "checked") set(node, name, value, isNew);
  }
  node.drawnProps = props;
}

function set(node, name, value, isNew) {
  if (name === "key" || name === "from") return;
  if (name === "at") return place(node, value, isNew);
  if (name.startsWith("on")) node[name] = value;
  else if (name === "value") {
    if (document.activeElement !== node && node.value !== String(value)) node.value = value;
  } else if (name === "checked") node.checked = Boolean(value);
  else if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else node.setAttribute(name, value === true ? "" : value);
}

// Something that travels: `at` is where it shall be, `from` where it comes from when it is new.
function place(node, at, isNew) {
  const there = `translate(${at.x}px, ${at.y}px)`;
  if (isNew && at.from) {
    node.style.transform = `translate(${at.from.x}px, ${at.from.y}px)`;
    requestAnimationFrame(() => requestAnimationFrame(() => { node.style.transform = node.goal; }));
  } else if (node.goal !== there) node.style.transform = there;
  node.goal = there;
}
