//! `kdlora compare`: the ways to make a classifier side by side.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use super::CommandError;
use super::distill::{bar, watch_parent};
use super::options::PlacesArgs;
use crate::distill::compare::{self, Announcement, CompareSpec, Order};
use crate::distill::models::Places;
use crate::parse;

/// Compare the teacher, fine-tuned in full and by LoRA, with students, with and without
/// distillation, on one data set over several seeds.
///
/// SPEC is JSON, see the README. The table appears in OUT as compare.md, compare.json and
/// compare.svg. What OUT holds of a comparison already is not done again.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File with the request.
    #[arg(long, value_name = "FILE", required_unless_present = "order")]
    spec: Option<PathBuf>,
    /// Folder of the comparison.
    #[arg(long, value_name = "DIR", required_unless_present = "order")]
    out: Option<PathBuf>,
    #[command(flatten)]
    places: PlacesArgs,
    /// One process's part of a comparison; it ends when standard input is closed.
    #[arg(long, hide = true, value_name = "FILE", conflicts_with_all = ["spec", "out"])]
    order: Option<PathBuf>,
}

/// Makes what is missing of the comparison and prints its table.
pub fn run(args: Args) -> Result<(), CommandError> {
    let places = args.places.places()?;
    if let Some(order) = &args.order {
        watch_parent()?;
        let order: Order = parse::json(&std::fs::read(order)?)?;
        return Ok(compare::carry_out(&order, &places, &mut *bar())?);
    }
    let (Some(spec), Some(out)) = (&args.spec, &args.out) else {
        return Err("--spec and --out are needed".into());
    };
    let spec: CompareSpec = parse::json(&std::fs::read(spec)?)?;
    let mut process = |order: &Path| carry_out(order, &places);
    let comparison = compare::run(&spec, &places, out, &mut process, &mut say)?;
    print!("{}", comparison.to_markdown());
    Ok(())
}

/// Runs this program for an order, and waits.
fn carry_out(order: &Path, places: &Places) -> io::Result<ExitStatus> {
    let gpu_memory = places.gpu.memory.map(|bytes| bytes.to_string());
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--log", "warn", "compare", "--order"])
        .arg(order)
        .arg("--student")
        .arg(&places.student)
        .arg("--cache")
        .arg(&places.cache)
        .arg("--adapters")
        .arg(&places.adapters)
        .arg("--threads")
        .arg(places.threads.to_string())
        .arg("--device")
        .arg(places.placement.device_name())
        .arg("--dtype")
        .arg(places.placement.dtype_name())
        .arg("--gpu-share")
        .arg(places.gpu.share.to_string())
        .args(
            gpu_memory
                .iter()
                .flat_map(|bytes| ["--gpu-memory-limit", bytes]),
        )
        // Held open until the child has ended: should this process die, the child does too.
        .stdin(Stdio::piped())
        .spawn()?;
    let lifeline = child.stdin.take();
    let status = child.wait();
    drop(lifeline);
    status
}

fn say(next: Announcement) {
    eprintln!(
        "[{}/{}] {}: {}",
        next.number, next.total, next.name, next.what
    );
}
