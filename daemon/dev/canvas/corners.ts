/** Where something may float over the canvas: in the corner that covers the fewest buttons. */

export interface Size {
  width: number;
  height: number;
}

export type Corner = "bottom-right" | "bottom-left" | "top-right" | "top-left";
/** In order of preference. */
export const CORNERS: readonly Corner[] = ["bottom-right", "bottom-left", "top-right", "top-left"];

/** What may not be covered. */
const CONTROLS = ".image-node :is(button, textarea, select, input)";

/** Returns where a box of a size lies in a corner of another. */
export function rectIn(corner: Corner, { width, height }: Size, around: DOMRect, margin: number): DOMRect {
  const [side, edge] = corner.split("-").reverse();
  const x = side === "right" ? around.right - margin - width : around.left + margin;
  const y = edge === "bottom" ? around.bottom - margin - height : around.top + margin;
  return new DOMRect(x, y, width, height);
}

/** Returns how many controls a box would cover; `except`: what is beside them, and is to be kept free as well. */
export function countCovered(box: DOMRect, besides = ""): number {
  const controls = [...document.querySelectorAll(besides ? `${CONTROLS}, ${besides}` : CONTROLS)];
  return controls.filter(control => {
    if (control.matches(".image-node-open")) return false; // as large as the picture
    const rect = control.getBoundingClientRect();
    return rect.width > 0 && rect.left < box.right && box.left < rect.right && rect.top < box.bottom && box.top < rect.bottom;
  }).length;
}

/** Returns the first corner in which the fewest controls are covered, and how many those are. */
export function findCorner(size: Size, around: DOMRect, margin: number, besides?: string): { corner: Corner; covered: number } {
  const found = CORNERS.map(corner => ({ corner, covered: countCovered(rectIn(corner, size, around, margin), besides) }));
  return found.reduce((best, each) => (each.covered < best.covered ? each : best));
}
