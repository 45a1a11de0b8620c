//! Generates the messages and clients from our protos.

use std::error::Error;

const PROTOS: &str = "../../../protos";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTOS}");
    let files = ["fleet", "history", "ingest"].map(|name| format!("openmanager/gateway/v1/{name}.proto"));
    let descriptors = protox::compile(files, [PROTOS])?;
    tonic_prost_build::configure().build_server(false).include_file("protos.rs").compile_fds(descriptors)?;
    Ok(())
}
