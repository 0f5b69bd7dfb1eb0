/** Numbers, amounts and times as people read them. */

// All are kept: to make one takes up to half a millisecond, and a look formats hundreds.
const number = new Intl.NumberFormat("en");
const amount = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const smallAmount = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 4 });
const timeOfDay = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const dayAndTime = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const timeWithSeconds = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

export const count = (value: number) => number.format(value);

export const plural = (value: number, one: string, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** At least two digits after the point; four where an amount is that small. */
export const dollars = (value: number) => `$${(value !== 0 && value < 1 ? smallAmount : amount).format(value)}`;

export function percent(share: number): string {
  const value = share * 100;
  return `${value > 0 && value < 10 ? value.toFixed(1).replace(/\.0$/, "") : Math.round(value)} %`;
}

export function seconds(milliseconds: number): string {
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  if (milliseconds < 100_000) return `${(milliseconds / 1000).toFixed(1)} s`;
  return duration(milliseconds / 1000);
}

/** A length of time in its greatest unit, or two. */
export function duration(value: number): string {
  const whole = Math.max(0, Math.floor(value));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${Math.floor(whole / 60) % 60} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor(whole / 3600) % 24} h`;
}

/** By the database's clock: this machine's may be wrong. */
export const ago = (instant: string, now: string) => `${duration((Date.parse(now) - Date.parse(instant)) / 1000)} ago`;

/** A time of this machine's zone, with its day unless that is today's. */
export function time(instant: string | number): string {
  const at = new Date(instant);
  return (at.toDateString() === new Date().toDateString() ? timeOfDay : dayAndTime).format(at);
}

export const clock = (instant: string) => timeWithSeconds.format(new Date(instant));
