//! Where the programs are.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Overrides where [`tool`] looks, for test binaries that were copied elsewhere (into a virtual machine, say). [`zinit`] is
/// then looked for beside it.
pub const TOOL_PATH_ENV: &str = "ZINIT_TEST_TOOL";

/// The `zinit-tracker` binary of this workspace, up to date.
///
/// # Panics
///
/// When it cannot be built: then no test of it means anything.
pub fn tool() -> &'static Path {
    static TOOL: OnceLock<PathBuf> = OnceLock::new();
    TOOL.get_or_init(|| programs().join("zinit-tracker"))
}

/// The `zinit` binary of this workspace, up to date.
///
/// # Panics
///
/// As [`tool`].
pub fn zinit() -> &'static Path {
    static ZINIT: OnceLock<PathBuf> = OnceLock::new();
    ZINIT.get_or_init(|| programs().join("zinit"))
}

/// The directory of both.
///
/// Cargo builds no binaries of other packages for an integration test, so the first caller has them built.
fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        if let Some(path) = std::env::var_os(TOOL_PATH_ENV) {
            let path = PathBuf::from(path);
            return path.parent().expect("a program is in a directory").to_owned();
        }
        let test = std::env::current_exe().expect("a test knows where it is");
        let profile = test
            .ancestors()
            .nth(2)
            .expect("tests are built below the profile's directory");
        let target = profile
            .parent()
            .expect("the profile's directory is in the target directory");
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command
            .args([
                "build",
                "--quiet",
                "--package",
                "zinit-tracker",
                "--bins",
                "--target-dir",
            ])
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        if profile.ends_with("release") {
            command.arg("--release");
        }
        let status = command.status().expect("cargo runs the tests, so it can be run");
        assert!(status.success(), "zinit-tracker does not build");
        profile.to_owned()
    })
}
