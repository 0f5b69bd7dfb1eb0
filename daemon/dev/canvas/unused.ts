/**
 * Stands in the page's bundle (`build.py`) for parts of supabase-js that it does not use, a sixth of the script. The session is
 * `image-jobs dev`'s own, and a client with an `accessToken` makes no client for auth; no Edge Function is called, and no
 * bucket for analytics.
 */

/** Of @supabase/auth-js. */
export class AuthClient {}

/** Of @supabase/functions-js. */
export class FunctionsClient {}
export class FunctionsError extends Error {}
export class FunctionsFetchError extends FunctionsError {}
export class FunctionsHttpError extends FunctionsError {}
export class FunctionsRelayError extends FunctionsError {}
export const FunctionRegion = {};

/** Of iceberg-js. */
export class IcebergRestCatalog {}
