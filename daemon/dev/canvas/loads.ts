/** Loads again and again while the server is away, one load at a time. Copy this file with workflow.ts, which says what a load is. */
import { isAway } from "./failures";
import type { Failure } from "./failures";

/** Milliseconds between two tries while the server is away: doubled each time. */
const FIRST_PAUSE = 2_000, LONGEST_PAUSE = 30_000;

export class Loads {
  readonly #once: () => Promise<Failure | undefined>;
  readonly #isOpen: () => boolean;
  readonly #refuse: (failure: Failure) => void;
  #inProgress: Promise<void> | undefined;
  #isWanted = false;
  #endPause: (() => void) | undefined;

  /** `once` loads, and returns why it could not; `refuse` is called with what trying again cannot change. */
  constructor(once: () => Promise<Failure | undefined>, isOpen: () => boolean, refuse: (failure: Failure) => void) {
    this.#once = once;
    this.#isOpen = isOpen;
    this.#refuse = refuse;
  }

  /** Called again meanwhile, it loads once more. */
  load(): Promise<void> {
    if (!this.#isOpen()) return Promise.resolve();
    this.#isWanted = true;
    this.#inProgress ??= this.#loadAll();
    return this.#inProgress;
  }

  /** Has a load that is under way followed by another one. */
  wantMore(): void {
    this.#isWanted = true;
  }

  /** Tries at once, if a pause is being made. */
  endPause(): void {
    this.#endPause?.();
  }

  /** Its caller has seen that it is open: it awaits before it ends. */
  async #loadAll(): Promise<void> {
    try {
      for (let pause = FIRST_PAUSE; this.#isWanted && this.#isOpen(); pause = Math.min(2 * pause, LONGEST_PAUSE)) {
        this.#isWanted = false;
        const failure = await this.#once();
        if (failure && !isAway(failure)) this.#refuse(failure);
        else if (failure) {
          this.#isWanted = true;
          await new Promise<void>(resolve => {
            this.#endPause = resolve;
            setTimeout(resolve, pause);
          });
        } else pause = FIRST_PAUSE;
      }
    } finally {
      this.#inProgress = undefined;
    }
  }
}
