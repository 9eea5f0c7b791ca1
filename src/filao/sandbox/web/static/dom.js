// A page as a function of what is known: `h` describes an element, `draw` brings the document to what is described.
// Children with a key keep their element, wherever the others go; so what moves can be animated, and what has the focus keeps it.

const SVG = "http://www.w3.org/2000/svg";

const flat = (children) => children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);

export const h = (tag, props, ...children) => ({ tag, props: props ?? {}, children: flat(children) });

export const draw = (parent, ...wanted) => bring(parent, flat(wanted));

function bring(parent, found) {
  if (!found.length && !parent.firstChild) return;
  const keys = new Set(found.map((child) => child.props?.key).filter((key) => key !== undefined));
  const keyed = new Map();
  for (const node of [...parent.childNodes]) {
    if (node.drawnKey === undefined) continue;
    if (keys.has(node.drawnKey)) keyed.set(node.drawnKey, node);
    else node.remove();
  }
  let at = parent.firstChild;
  for (const child of found) {
    const node = typeof child === "object" ? element(parent, child, at, keyed) : textNode(child, at);
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function textNode(text, at) {
  const value = String(text);
  if (at?.nodeType !== Node.TEXT_NODE) return document.createTextNode(value);
  if (at.data !== value) at.data = value;
  return at;
}

function element(parent, wanted, at, keyed) {
  const key = wanted.props.key;
  let node = key === undefined ? at : keyed.get(key);
  const fits = node?.nodeType === Node.ELEMENT_NODE && node.localName === wanted.tag && node.drawnKey === key;
  const isNew = !fits;
  if (isNew) node = create(parent, wanted.tag);
  node.drawnKey = key;
  update(node, wanted.props, isNew);
  bring(node, wanted.children);
  return node;
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
