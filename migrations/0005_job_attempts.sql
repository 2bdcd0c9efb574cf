-- How often a job's process has been started: one that is killed again and again is given up.
ALTER TABLE jobs ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
