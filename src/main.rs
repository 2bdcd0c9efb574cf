use std::process::ExitCode;

fn main() -> ExitCode {
    kdlora::ops::use_calling_thread_only();
    kdlora::cli::main()
}
