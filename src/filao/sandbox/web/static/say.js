// What the page says, in its language: texts by key, filled with values, numbers written as the language writes them.

const told = JSON.parse(document.getElementById("told").textContent);

export const { language, words, lesson, steps, programs, glossary, further, python, may_run_code: mayRunCode, python_errors: pythonErrors } = told;

// Formats are dear to make, and a drawing writes hundreds of numbers: each is made once.
const formats = new Map();

function format(key, options) {
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(words.locale, options));
  return formats.get(key);
}

export function number(value, digits) {
  const options = digits === undefined ? { maximumFractionDigits: 2 } : { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return format(digits, options).format(Number(value));
}

export const seconds = (value, digits = 1) => `${number(value, digits)}\u00a0s`;
export const euros = (cents) => format("euros", { style: "currency", currency: "EUR", maximumFractionDigits: 0 }).format(cents / 100);

const RAW = ["pid", "other", "line"]; // numbers that are names

// `{name}` is a value, `{name|one|many}` a word that goes with it.
export function fill(text, values = {}) {
  return text.replace(/{([\w-]+)(?:\|([^|}]*)\|([^}]*))?}/g, (whole, name, one, many) => {
    if (!(name in values)) return "…";
    const value = values[name];
    if (one !== undefined) return isOne(Number(value)) ? one : many;
    return !RAW.includes(name) && /^-?\d+(\.\d+)?$/.test(String(value)) ? written(String(value)) : String(value);
  });
}

const isOne = (value) => (language === "fr" ? Math.abs(value) < 2 : value === 1);

function written(value) {
  const digits = value.includes(".") ? value.split(".")[1].length : 0;
  return number(value, digits);
}

export const say = (key, values) => fill(words[key] ?? key, values);

// A text of the lesson, with `code` in its place.
export function rich(text, values, h) {
  return fill(text, values).split("`").map((part, place) => (place % 2 ? h("code", {}, part) : part));
}

// What Python says, in the language of the page; nothing where it is not known. `{1}` is the first of what varies.
export function translated(error) {
  for (const [says, means] of Object.entries(pythonErrors)) {
    const found = new RegExp(`^${says}$`, "s").exec(error);
    if (found) return means.replace(/{(\d)}/g, (_, place) => found[place]);
  }
  return "";
}

// An error that our own consumers or the learner's storage gave, in the words of the page.
export const fault = (text) => words[`fault_${text}`] ?? text;
