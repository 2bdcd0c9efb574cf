//! `kdlora completions`: completion of the command line, by shell.

use std::io;

use clap::CommandFactory;
use clap_complete::Shell;

/// Print the completion script of a shell.
///
/// For bash: kdlora completions bash > ~/.local/share/bash-completion/completions/kdlora
#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(value_enum)]
    shell: Shell,
}

pub fn run(args: &Args) {
    let mut command = super::Cli::command();
    clap_complete::generate(args.shell, &mut command, "kdlora", &mut io::stdout());
}
