//! `zinit-tracker tree`: services and their processes by who created whom.

use std::{collections::BTreeMap, process::ExitCode};

use clap::Args;
use zinit_tracker::{Member, process::ProcessKey};

use super::{Global, output, ps};

/// Show services and their processes as trees of who created whom.
///
/// Creation does not change when a process is reparented; a process whose creator has died stands at the top.
#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    listing: ps::Options,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    ps::show(global, &options.listing, tree)
}

fn tree(members: &[Member]) -> String {
    let mut children: BTreeMap<ProcessKey, Vec<&Member>> = BTreeMap::new();
    let mut top = Vec::new();
    for member in members {
        if members.iter().any(|other| other.key == member.parent) {
            children.entry(member.parent).or_default().push(member);
        } else {
            top.push(member);
        }
    }
    let mut text = String::new();
    // Depth first with a stack of its own: a chain of generations may be as long as the books are large.
    let mut stack: Vec<(&Member, String, bool)> = Vec::new();
    for (index, member) in top.iter().enumerate().rev() {
        stack.push((member, String::new(), index + 1 == top.len()));
    }
    while let Some((member, indent, is_last)) = stack.pop() {
        let branch = if is_last { "└─" } else { "├─" };
        text.push_str(&format!(
            "{indent}{branch} {} {}\n",
            member.pid,
            output::plain(&member.comm)
        ));
        let below = format!("{indent}{}", if is_last { "   " } else { "│  " });
        if let Some(children) = children.get(&member.key) {
            for (index, child) in children.iter().enumerate().rev() {
                stack.push((child, below.clone(), index + 1 == children.len()));
            }
        }
    }
    text
}
