"""A local stand-in for the endpoints of a Supabase project, as far as supabase-py and supabase-js call them.

gateway      one port for all endpoints
keys         anon and service_role key, tokens
errors       error responses over HTTP
project.sql  roles and schemas that a Supabase database has before our migrations
auth/        sign-in
rest/        PostgREST
realtime/    broadcasts, and changes of published tables
storage/     buckets and objects
"""
