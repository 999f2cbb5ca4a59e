//! What is tested on which kernel, and which promise of the tracker each group of tests shows.
//!
//! A group is a file of `tests/tests`. Emulation is slow, so that a group runs where it says something about the kernel:
//! attribution everywhere, the rest on the oldest, the newest, those that lose events, and those with the gate in question.

use super::kernels::Boot;

/// A group, or a part of it, that has a place of its own.
struct Plan {
    group: &'static str,
    /// By their names in the matrix.
    boots: &'static [&'static str],
    /// What its test binary is given when the caller gives nothing: a filter where all would take too long.
    arguments: &'static [&'static str],
}

const PLANS: [Plan; 15] = [
    Plan {
        group: "escapes",
        boots: &["5.10", "7.x"],
        arguments: &[],
    },
    Plan {
        group: "escapes",
        boots: &[
            LSM,
            "6.1",
            "6.12",
            "6.12 preempt=full",
            "6.18",
            "7.x preempt=full",
            LOCKDOWN,
        ],
        arguments: &["--skip", "nested_pid_namespace"],
    },
    Plan {
        group: "reuse",
        boots: &["5.10", "7.x preempt=full"],
        arguments: &[],
    },
    Plan {
        group: "stopping",
        boots: &["5.10", "7.x preempt=full"],
        arguments: &[],
    },
    Plan {
        group: "trees",
        boots: &["7.x preempt=full"],
        arguments: &["last_quarter"],
    },
    Plan {
        group: "cli",
        boots: &["5.10"],
        // What takes long there and says nothing about the kernel.
        arguments: &[
            "--skip",
            "twenty_runs",
            "--skip",
            "every_subcommand",
            "--skip",
            "few_file_descriptors",
            "--skip",
            "bad_input",
        ],
    },
    Plan {
        group: "survivors",
        boots: &["7.x"],
        // All of them wait for most of their time.
        arguments: &["--test-threads", "15"],
    },
    Plan {
        group: "unproven",
        boots: &["6.1"],
        // Seventeen thousand deaths, as for the storms below.
        arguments: &["--skip", "deaths_that_left_no_record"],
    },
    Plan {
        group: "losses",
        boots: &["7.x preempt=full"],
        arguments: &[],
    },
    Plan {
        group: "replacing",
        boots: &["5.10", "7.x preempt=full"],
        arguments: &[],
    },
    Plan {
        group: "moving",
        boots: &["5.10", "7.x preempt=full"],
        // Three thousand processes of a shell's, as for the storms below.
        arguments: &["--skip", "born_meanwhile"],
    },
    Plan {
        group: "filter",
        boots: &["7.x preempt=full"],
        arguments: &[],
    },
    Plan {
        group: "table",
        boots: &["5.10", "7.x"],
        arguments: &[],
    },
    Plan {
        group: "storms",
        boots: &[LSM],
        // Two thousand processes take an emulated machine minutes to create.
        arguments: &["--skip", "two_thousand"],
    },
    Plan {
        group: "zinit_faults",
        boots: &["6.18"],
        // The clock is the guest's own. All other faults come on the machine that this runs on, at its pace.
        arguments: &["a_clock_that_jumps"],
    },
];

/// 5.10 with the LSM that its kernel has and its list of modules lacks.
const LSM: &str = "5.10 lsm=lockdown,yama,apparmor,bpf";

const LOCKDOWN: &str = "7.x lockdown=confidentiality";

/// Where a group runs that no plan names, so that a new one is not forgotten.
const OTHERS: &[&str] = &["6.12"];

/// Groups that run in no guest: what tests the actors alone, or what stands above the tracker, says nothing about a kernel
/// (that it boots one is what `--pid1` shows), nor does what is drawn, or done without BPF, nor the ring, on which no decision depends; and twenty thousand processes take more memory than a
/// guest has.
pub(crate) const LEFT_OUT: &[&str] = &[
    "actor",
    "bpftool",
    "dependencies",
    "diff",
    "events",
    "fallback",
    "golden",
    "guide",
    "hanging",
    "idle",
    "limits",
    "lineages",
    "listings",
    "locked",
    "manual",
    "metrics",
    "pid1",
    "reaping",
    "requests",
    "schemas",
    "supervisor",
    "terminal",
    "top",
    "why",
    "zinit_bad_input",
    "zinit_cli",
    "zinit_crash",
    "zinit_escapes",
    "zinit_examples",
    "zinit_figures",
    "zinit_levels",
    "zinit_places",
    "zinit_rpc",
    "zinit_upgrade",
    "zinit_users",
];

/// The groups that show each promise, by the number that `doctor` gives it.
pub(crate) const PROMISES: [(u32, &[&str]); 8] = [
    (1, &["escapes", "filter", "trees", "storms"]),
    (2, &["reuse", "stopping", "fallback_reuse"]),
    (3, &["escapes", "stopping", "survivors"]),
    (4, &["unproven", "losses"]),
    (5, &["cli", "replacing", "moving", "zinit_faults"]),
    (6, &["losses", "unproven"]),
    // What a bystander pays is measured elsewhere, and not in emulation.
    (7, &[]),
    (8, &["fallback_tool", "cli"]),
];

/// A group that a boot runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Call<'g> {
    pub(crate) group: &'g str,
    /// What its test binary is given when the caller gives nothing.
    pub(crate) arguments: &'static [&'static str],
}

/// Which of these groups each of the boots runs, in the order of the boots; nothing where there is no kernel.
///
/// A group whose kernels are all missing runs on the first that is there: it must not go unnoticed with them.
pub(crate) fn assign<'g>(groups: &[&'g str], boots: &[Boot]) -> Vec<Vec<Call<'g>>> {
    let mut assigned: Vec<Vec<Call<'g>>> = boots.iter().map(|_| Vec::new()).collect();
    let substitute = boots.iter().position(|boot| boot.image.is_ok());
    for group in groups {
        let mut places = places(group);
        for (index, boot) in boots.iter().enumerate().filter(|(_, boot)| boot.image.is_ok()) {
            let place = places.iter().find(|(boots, _)| boots.contains(&boot.name.as_str()));
            if let Some((_, arguments)) = place {
                assigned[index].push(Call { group, arguments });
            }
        }
        let missing = !assigned.iter().flatten().any(|call| call.group == *group);
        if let (Some(index), true) = (substitute, missing) {
            let (_, arguments) = places.swap_remove(0);
            assigned[index].push(Call { group, arguments });
        }
    }
    assigned
}

/// The boots that a group has a place on, with its arguments there.
fn places(group: &str) -> Vec<(&'static [&'static str], &'static [&'static str])> {
    let planned = PLANS.iter().filter(|plan| plan.group == group);
    let planned: Vec<_> = planned.map(|plan| (plan.boots, plan.arguments)).collect();
    if planned.is_empty() {
        return vec![(OTHERS, &[])];
    }
    planned
}

/// Plans for groups that do not exist.
pub(crate) fn stale(groups: &[&str]) -> Vec<&'static str> {
    let planned = PLANS.iter().map(|plan| plan.group);
    planned.filter(|group| !groups.contains(group)).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::kernels, *};
    use anyhow::anyhow;

    fn boot(name: &str, there: bool) -> Boot {
        Boot {
            name: name.to_owned(),
            version: String::new(),
            arguments: String::new(),
            image: if there {
                Ok("vmlinuz".into())
            } else {
                Err(anyhow!("gone"))
            },
        }
    }

    fn called<'g>(group: &'g str, arguments: &'static [&'static str]) -> Call<'g> {
        Call { group, arguments }
    }

    #[test]
    fn every_boot_that_is_planned_for_is_in_the_matrix() {
        let names = kernels::names();
        for planned in PLANS.iter().map(|plan| plan.boots).chain([OTHERS]) {
            for name in planned {
                assert!(names.iter().any(|known| known == name), "{name}");
            }
        }
    }

    #[test]
    fn a_group_that_no_plan_names_runs_on_one_kernel() {
        let boots = [boot("5.10", true), boot("6.12", true), boot("7.x preempt=full", true)];
        let assigned = assign(&["brand_new", "escapes", "trees"], &boots);
        let part = &["--skip", "nested_pid_namespace"];
        assert_eq!(assigned[0], [called("escapes", &[])]);
        assert_eq!(assigned[1], [called("brand_new", &[]), called("escapes", part)]);
        assert_eq!(
            assigned[2],
            [called("escapes", part), called("trees", &["last_quarter"])]
        );
    }

    #[test]
    fn a_group_whose_kernels_are_missing_runs_on_another() {
        let boots = [boot("5.10", false), boot("6.1", true), boot("7.x", false)];
        let assigned = assign(&["escapes", "stopping"], &boots);
        assert_eq!(
            assigned,
            [
                vec![],
                vec![
                    called("escapes", &["--skip", "nested_pid_namespace"]),
                    called("stopping", &[])
                ],
                vec![]
            ]
        );
    }
}
