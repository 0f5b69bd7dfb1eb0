/** Where something may float over the canvas: in the corner that covers the fewest buttons. */

export interface Size {
  width: number;
  height: number;
}

export type Corner = "bottom-right" | "bottom-left" | "top-right" | "top-left";
/** In order of preference. */
export const CORNERS: readonly Corner[] = ["bottom-right", "bottom-left", "top-right", "top-left"];

/** What may not be covered; what opens a picture is as large as the picture. */
const CONTROLS = ".image-node :is(button:not(.image-node-open), textarea, select, input)";

/** Returns the first corner in which the fewest controls are covered, and how many. `besides`: what is to be kept free as well. */
export function findCorner(size: Size, around: DOMRect, margin: number, besides?: string): { corner: Corner; covered: number } {
  const controls = [...document.querySelectorAll(besides ? `${CONTROLS}, ${besides}` : CONTROLS)].map(it => it.getBoundingClientRect());
  const found = CORNERS.map(corner => {
    const box = rectIn(corner, size, around, margin);
    return { corner, covered: controls.filter(rect => overlap(rect, box)).length };
  });
  return found.reduce((best, each) => (each.covered < best.covered ? each : best));
}

/** Returns where a box of a size lies in a corner of another. */
function rectIn(corner: Corner, { width, height }: Size, around: DOMRect, margin: number): DOMRect {
  const [edge, side] = corner.split("-");
  const x = side === "right" ? around.right - margin - width : around.left + margin;
  const y = edge === "bottom" ? around.bottom - margin - height : around.top + margin;
  return new DOMRect(x, y, width, height);
}

function overlap(rect: DOMRect, box: DOMRect): boolean {
  return rect.width > 0 && rect.left < box.right && box.left < rect.right && rect.top < box.bottom && box.top < rect.bottom;
}
