//! Routes by group, errors, limits.
