/**
 * Stands for @supabase/auth-js in the page's bundle (`build.py`): the session is `image-jobs dev`'s own, and a client with an
 * `accessToken` makes no client for auth. A seventh of the script would be for nothing.
 */
export class AuthClient {}
