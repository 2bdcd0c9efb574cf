//! The state folder: a SQLite database of jobs and versions, and folders of bytes.
