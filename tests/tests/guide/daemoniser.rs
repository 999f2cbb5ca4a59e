//! A script that puts its work into the background in three ways, and ends.

use zinit_tests::daemon::wait_for;

use super::{
    case::{Case, nobody_was_killed, pid_of, set},
    document::Numbers,
};

const PROGRAM: &str = "/usr/local/bin/legacy";

#[test]
fn what_a_daemonising_script_leaves_is_tracked_and_stopped() {
    let mut case = Case::prepare("A script", "legacy");
    let program = case.write_program(PROGRAM, &[]);
    case.define(0, &[(PROGRAM, &program)]);
    case.start(&[]);
    case.daemon.wait_for_state("legacy", "Success");
    let supervisor = case.daemon.process().as_raw_nonzero().get();
    let workers = ["sleep 3701", "sleep 3702", "sleep 3703"];
    let present = case.wait_until_tracked(|present| {
        let lines: Vec<_> = present.iter().map(|pid| super::case::command_line(*pid)).collect();
        lines.len() == 3 && workers.iter().all(|worker| lines.iter().any(|line| line == worker))
    });

    let escapes = case.escapes();
    assert_eq!(escapes.keys().copied().collect::<Vec<_>>(), Vec::from_iter(present));
    for (worker, left) in workers.iter().zip([
        &["session", "group", "parent"][..],
        &["parent"],
        &["session", "group", "parent"],
    ]) {
        let pid = case.with_command(|line| line == *worker).pop_first().unwrap();
        assert_eq!(escapes[&pid], set(left), "{worker}: {escapes:?}");
    }
    for escape in case.listed_escapes() {
        // Its creator is dead, and known; its parent is the supervisor, which is given orphans.
        let creator = &escape["line"][1];
        assert_eq!(
            (&creator["alive"], &creator["fate"]["exited"]),
            (&false.into(), &0.into()),
            "{escape:#}"
        );
        let parent = escape["left"]
            .as_array()
            .unwrap()
            .iter()
            .find(|left| left["what"] == "parent");
        assert_eq!(parent.unwrap()["now"], supervisor, "{escape:#}");
        let last = escape["line"].as_array().unwrap().last().unwrap();
        assert_eq!(last["main"], true, "{escape:#}");
        println!("{} was created by {}", pid_of(&escape), creator["comm"]);
    }
    case.shows("zinit-tracker escapes legacy", Numbers::Large);
    let nohup = case.with_command(|line| line == "sleep 3702").pop_first().unwrap();
    case.shows(&format!("zinit-tracker why {nohup}"), Numbers::Large);
    case.shows("zinit-tracker diff legacy", Numbers::Large);

    let report = case.stop();
    assert!(nobody_was_killed(&report), "{report:#}");
    case.end();
}

#[test]
fn what_a_script_leaves_ends_with_it_unless_it_is_a_oneshot() {
    let mut case = Case::prepare("A script", "legacy");
    let program = case.write_program(PROGRAM, &[]);
    case.define(0, &[(PROGRAM, &program), ("oneshot: true", "restart: {policy: never}")]);
    case.start(&[]);
    case.daemon.wait_for_state("legacy", "Success");
    wait_for("all has ended", || case.present().is_empty());
    case.end_of_a_part();
}
