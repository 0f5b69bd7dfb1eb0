/**
 * The server's clock, as far as its messages tell it: a computer may be minutes off. Copy this file with workflow.ts.
 *
 * What comes now was written at most a moment ago, so the least distance that was seen is the difference. Of rows that were
 * loaded only one thing is certain: none was written later than now.
 */
export class Clock {
  /** Milliseconds that this computer is ahead of the server. */
  #ahead: number | undefined;

  /** Takes note of an instant of the server's (ISO). `isNew`: it is of a message that has just been sent. */
  hear(instant: string | undefined, isNew: boolean): void {
    const distance = Date.now() - Date.parse(instant ?? "");
    if (Number.isNaN(distance) || (!isNew && distance >= 0)) return;
    this.#ahead = Math.min(distance, this.#ahead ?? Infinity);
  }

  /** Returns an instant of the server's as milliseconds since 1970 by this computer's clock. */
  here(instant: string): number {
    return Date.parse(instant) + (this.#ahead ?? 0);
  }
}
