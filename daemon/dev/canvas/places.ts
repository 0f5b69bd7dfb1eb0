/** Where a node may lie: free of others, and in sight. It knows no framework. */
import type { Position } from "./nodes";

export interface Box extends Position {
  width: number;
  height: number;
}

/** Of a node that is not measured yet. */
export const NODE_SIZE = { width: 292, height: 400 };
const GAP = 48;
/** The length of an edge that is to be seen. */
const EDGE = 80;
const MAX_RINGS = 40;

/** Returns the nearest free place to the right of a box, else below, above or left of it, else further away. */
export function placeBeside(box: Box, others: readonly Box[]): Position {
  const { width, height } = NODE_SIZE;
  const right = { x: box.x + box.width + GAP, y: box.y };
  const places = [
    right,
    { x: box.x, y: box.y + box.height + GAP },
    { x: box.x, y: box.y - height - GAP },
    { x: box.x - width - GAP, y: box.y },
  ];
  return places.find(place => isFree(place, others)) ?? placeNear(right, others);
}

/** Returns the nearest free place in the column to the right of a box, where an edge from it is seen. */
export function placeAfter({ x, y, width }: Box, others: readonly Box[]): Position {
  const right = { x: x + width + EDGE, y }, step = NODE_SIZE.height + GAP;
  for (let row = 0; row < MAX_RINGS; row++) {
    for (const place of [{ ...right, y: y + row * step }, { ...right, y: y - row * step }]) if (isFree(place, others)) return place;
  }
  return right;
}

/** Returns a place, or the free one that is nearest to it: on rings around it, a node and a gap apart. */
export function placeNear({ x, y }: Position, others: readonly Box[]): Position {
  const [stepX, stepY] = [NODE_SIZE.width + GAP, NODE_SIZE.height + GAP];
  for (let ring = 0; ring < MAX_RINGS; ring++) {
    const places: Position[] = [];
    for (let right = -ring; right <= ring; right++) {
      for (let down = -ring; down <= ring; down++) {
        if (Math.max(Math.abs(right), Math.abs(down)) === ring) places.push({ x: x + right * stepX, y: y + down * stepY });
      }
    }
    const distance = (place: Position) => Math.hypot(place.x - x, place.y - y) + (place.x < x || place.y < y ? 1 : 0);
    const [nearest] = places.filter(place => isFree(place, others)).sort((one, other) => distance(one) - distance(other));
    if (nearest) return { x: Math.round(nearest.x), y: Math.round(nearest.y) };
  }
  return { x: Math.round(x), y: Math.round(y) };
}

/** Returns how far nodes are moved to lie over no other: not at all, else as far as they reach together, right of there or below. */
export function findShift(group: readonly Position[], others: readonly Box[]): Position {
  const reach = (each: readonly number[], size: number) => Math.max(...each) - Math.min(...each) + size + GAP;
  const width = reach(group.map(({ x }) => x), NODE_SIZE.width), height = reach(group.map(({ y }) => y), NODE_SIZE.height);
  const isClear = ({ x, y }: Position) => group.every(place => isFree({ x: place.x + x, y: place.y + y }, others));
  const shifts = Array.from({ length: MAX_RINGS }, (_, ring) =>
    [{ x: ring * width, y: 0 }, { x: 0, y: ring * height }, { x: -ring * width, y: 0 }, { x: 0, y: -ring * height }]).flat();
  return shifts.find(isClear) ?? { x: width, y: 0 };
}

function isFree(place: Position, others: readonly Box[]): boolean {
  const { width, height } = NODE_SIZE;
  return !others.some(box =>
    place.x < box.x + box.width + GAP / 4 && box.x < place.x + width + GAP / 4
    && place.y < box.y + box.height + GAP / 4 && box.y < place.y + height + GAP / 4);
}

/** Whether one box lies in another. */
export function contains(outer: Box, inner: Box): boolean {
  return inner.x >= outer.x && inner.y >= outer.y
    && inner.x + inner.width <= outer.x + outer.width && inner.y + inner.height <= outer.y + outer.height;
}
