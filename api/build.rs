//! Generates the wire types into `OUT_DIR`. Both compilers are Rust libraries: no `protoc` on the machine.

use std::env;
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo:rerun-if-changed=../proto");
    if env::var_os("CARGO_FEATURE_CRI").is_some() {
        cri(&out)?;
    }
    shim(&out)
}

fn cri(out: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let mut compiler = protox::Compiler::new(["../proto/cri/v1"])?;
    compiler.include_source_info(true).include_imports(true).open_file("../proto/cri/v1/api.proto")?;
    let descriptors = compiler.file_descriptor_set();
    // Encoded by the compiler: its own type for a descriptor set has lost the options that it does not know,
    // `debug_redact` for one. The comments are for the generated code only.
    let encoded = compiler.include_source_info(false).encode_file_descriptor_set();
    std::fs::write(out.join("cri.descriptors"), encoded)?;
    // RPCs that the daemon does not implement answer UNIMPLEMENTED through the generated stubs.
    tonic_prost_build::configure()
        .btree_map(".")
        // Its Debug would print passwords; `cri.rs` has one that does not.
        .skip_debug(["runtime.v1.AuthConfig"])
        .generate_default_stubs(true)
        .out_dir(out)
        .compile_fds(descriptors)?;
    Ok(())
}

fn shim(out: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let dir = out.join("shim");
    std::fs::create_dir_all(&dir)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&dir)
        .input("../proto/shim/v1/shim.proto")
        .include("../proto/shim/v1")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()?;
    // The generated files begin with inner attributes, so they must be modules of their own, not included text.
    std::fs::write(dir.join("mod.rs"), "pub mod shim;\npub mod shim_ttrpc;\n")?;
    Ok(())
}
