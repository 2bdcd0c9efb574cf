//! `kdlora pull`: fetches encoders by their catalog names.

use super::options::CacheArgs;
use crate::hub::{self, HubError};

/// Fetch encoders into the cache folder, verified; at once if they are there.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Catalog names, or layers of an encoder (mpnet-base@0,4,8).
    #[arg(required_unless_present = "list", value_name = "NAME")]
    pub names: Vec<String>,
    /// Show the catalog instead.
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Prints the folder of each encoder on standard output, one a line.
pub fn run(args: Args) -> Result<(), HubError> {
    let cache = args.cache.folder()?;
    if args.list {
        for entry in hub::entries() {
            let here = if hub::resolve(&entry.name, &cache).is_ok() {
                "pulled"
            } else {
                ""
            };
            println!(
                "{:<18} {:<7} {:<11} {}",
                entry.name, here, entry.licence, entry.about
            );
            if let Some(note) = &entry.note {
                println!("{:<38} {note}", "");
            }
        }
        return Ok(());
    }
    for name in &args.names {
        println!("{}", hub::pull(name, &cache, true)?.display());
    }
    Ok(())
}
