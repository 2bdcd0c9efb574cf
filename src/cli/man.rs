//! `kdlora man`: the manual pages.

use std::io;
use std::path::PathBuf;

use clap::CommandFactory;

/// Write the manual: one page on standard output, or all pages into a folder.
///
/// kdlora man --out /usr/local/share/man/man1
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder that gets a page for each command; it is made if it is missing.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: &Args) -> io::Result<()> {
    let command = super::Cli::command();
    match &args.out {
        None => clap_mangen::Man::new(command).render(&mut io::stdout()),
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            clap_mangen::generate_to(command, folder)
        }
    }
}
