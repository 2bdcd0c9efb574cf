-- A job of a greater priority is started first; among equals the older one.
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
