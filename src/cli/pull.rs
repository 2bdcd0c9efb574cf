//! `kdlora pull`: fetches encoders by their catalog names, and data sets of GLUE.

use super::options::CacheArgs;
use crate::hub::{self, HubError};

const EXAMPLES: &str = "\
Examples:
  kdlora pull --list
  kdlora pull minilm-l6 mpnet-base
  kdlora pull mpnet-base@0,5,11                 three layers of it, as an encoder of their own
  kdlora pull glue/mrpc                         train and development rows, for \"preset\": \"mrpc\"";

/// Fetch encoders into the cache folder, verified; at once if they are there. Data sets of GLUE
/// (glue/mrpc) come from the hub.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Catalog names, layers of an encoder (mpnet-base@0,4,8), data sets of GLUE (glue/mrpc).
    #[arg(required_unless_present = "list", value_name = "NAME")]
    pub names: Vec<String>,
    /// Show the catalog instead.
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    cache: CacheArgs,
}

/// Prints the folder of each on standard output, one a line.
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
        println!("{}", hub::pull_any(name, &cache, true)?.display());
    }
    Ok(())
}
