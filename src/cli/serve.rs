//! `kdlora serve`: the HTTP server.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use utoipa_axum::router::OpenApiRouter;

use super::CommandError;
use crate::http::auth::AdminAccess;
use crate::http::health::Readiness;
use crate::http::{self, AppState, Limits};
use crate::telemetry::Metrics;

/// Start the server.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address to listen on.
    #[arg(
        long,
        env = "KDLORA_BIND",
        default_value = "127.0.0.1:8080",
        value_name = "ADDRESS"
    )]
    bind: SocketAddr,
}

/// Runs the server until it is told to stop.
pub fn run(args: Args) -> Result<(), CommandError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(args.bind).await?;
        serve(listener, async {
            // Without a handler for the signal, the server runs until it is killed.
            let _ = tokio::signal::ctrl_c().await;
        })
        .await
    })
}

/// Serves on `listener` until `shutdown` completes.
pub async fn serve(
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), CommandError> {
    let access = if listener.local_addr()?.ip().is_loopback() {
        AdminAccess::Loopback
    } else {
        AdminAccess::Closed
    };
    let state = AppState {
        metrics: Arc::new(Metrics::new()?),
        readiness: Readiness::default(),
        limits: Limits::default(),
    };
    let router = http::router(state.clone(), access, OpenApiRouter::new());
    state.readiness.set_ready();
    println!("kdlora listens on http://{}", listener.local_addr()?);
    axum::serve(listener, router)
        .with_graceful_shutdown(shutdown)
        .await?;
    Ok(())
}
