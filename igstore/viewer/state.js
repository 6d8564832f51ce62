// What the page shows, as the part of its address after the #: #image=ID&p=50&keep=bottom.

import { SORTS } from "./catalogue.js";
import { FILLS, SELECTIONS } from "./masks.js";

export const KEEPS = ["top", "bottom"];

// The values that are allowed where only some are, the usual one first.
const CHOICES = {
  keep: ["bottom", "top"],
  select: Object.keys(SELECTIONS),
  fill: Object.keys(FILLS),
  sort: Object.keys(SORTS),
};
const ALWAYS = ["image", "p", "keep"]; // what an address says even if it is the usual

// p as text, in tenths of a percent from 0 to 1000; the usual 50% where it is no number.
export function tenthsOf(text) {
  const tenths = text?.trim() ? Math.round(10 * Number(text)) : NaN;
  return Number.isNaN(tenths) ? 500 : Math.min(1000, Math.max(0, tenths));
}

// The state that a hash asks for, whatever it holds; an image or ranking may be one that does not exist.
export function parseHash(hash) {
  const asked = new URLSearchParams(hash.replace(/^#/, ""));
  const choices = Object.entries(CHOICES).map(([name, allowed]) => {
    const value = asked.get(name);
    return [name, allowed.includes(value) ? value : allowed[0]];
  });
  return {
    image: asked.get("image"),
    tenths: tenthsOf(asked.get("p")),
    ranking: asked.get("ranking"),
    search: asked.get("search") ?? "",
    wrong: asked.get("wrong") === "1",
    ...Object.fromEntries(choices),
  };
}

export function formatHash({ tenths, wrong, ...rest }, usualRanking) {
  const texts = { image: rest.image, p: String(tenths / 10), keep: rest.keep, ...rest, wrong: wrong ? "1" : "" };
  const usual = { ranking: usualRanking, search: "", wrong: "" };
  for (const [name, allowed] of Object.entries(CHOICES)) usual[name] = allowed[0];
  const told = Object.entries(texts).filter(
    ([name, value]) => value !== null && (ALWAYS.includes(name) || value !== usual[name]),
  );
  return `#${new URLSearchParams(told)}`;
}
