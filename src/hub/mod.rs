//! Fetches an encoder by its catalog name into the cache folder.
