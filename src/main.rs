use std::process::ExitCode;

fn main() -> ExitCode {
    kdlora::cli::main()
}
