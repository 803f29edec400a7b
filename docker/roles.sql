-- The service has a role of its own that may do all in its database and nothing elsewhere. The superuser keeps no
-- password, and with that no way in but the socket inside the container.
\getenv password POSTGRES_PASSWORD
CREATE ROLE bitfrontier LOGIN PASSWORD :'password';
CREATE DATABASE bitfrontier OWNER bitfrontier;
ALTER ROLE CURRENT_USER PASSWORD NULL;
