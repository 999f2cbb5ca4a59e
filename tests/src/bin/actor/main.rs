//! Plays the services of the end-to-end tests: each behaviour is one way to get away from a supervisor.
//!
//! A small program on purpose: fork, clone and exec as services use them, no runtime, no thread that the behaviour does not
//! ask for. Every process rests until it is killed and ends by itself after five minutes, whatever becomes of the test.
//! Readiness is reported as `zinit_tests::ready` describes, when all processes of the behaviour exist and have their signal
//! dispositions.

mod acks;
mod endless;
mod escapes;
mod held;
mod holders;
mod life;
mod logged;
mod loops;
mod process;
mod ready;
mod signals;
mod tree;

use std::convert::Infallible;
use std::str::FromStr;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};

use endless::Sessions;

const USAGE: &str = "\
usage: actor BEHAVIOUR [ARGS]

one process                      rest
ended by a status                spawn-and-exit STATUS, exit-on-term STATUS
other session, group, parent     child, setsid, setpgid, double-fork, double-fork-orphan, sessions N, chain N, subreaper
other ways to create a process   thread-fork, vfork, posix-spawn, clone-parent
other surroundings               cgroup-move DIR, pid-namespace, namespaces, time-namespace, clear-env MARKER
without a trace                  vanish MARKER, vanish-to DIR MARKER
signals                          ignore-term, ignore-term-grandchildren, stopped, fork-on-term, slow-term FILE MILLIS
never at rest                    refork-chain [SECONDS], refork-chains N, storm N [SECONDS], session-storm N
short-lived children             fork-loops LOOPS N, loop-on-term N
something held                   tcp PORT (0: any), flock FILE
held by something                thread, vfork-wait, stat FILE, user-namespace
a random tree                    tree SEED MAX, logged-tree SEED MAX FILE
not a service: traces one        trace TID let-go|reaped";

fn main() {
    // A panic in a forked child would unwind into the frames of its parent.
    std::panic::set_hook(Box::new(|panic| ready::fail(&anyhow::anyhow!("{panic}"))));
    life::begin();
    LazyLock::force(&process::ACTOR);
    let args: Vec<_> = std::env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let Err(error) = perform(&args);
    ready::fail(&error);
}

fn perform(args: &[&str]) -> Result<Infallible> {
    match *args {
        ["rest"] => escapes::rest(),
        ["child"] => escapes::child(),
        ["setsid"] => escapes::setsid(),
        ["setpgid"] => escapes::setpgid(),
        ["double-fork"] => escapes::double_fork(),
        ["double-fork-orphan"] => escapes::double_fork_orphan(),
        ["sessions", count] => escapes::sessions(number(count)?),
        ["chain", generations] => escapes::chain(number(generations)?),
        ["subreaper"] => escapes::subreaper(),
        ["thread-fork"] => escapes::thread_fork(),
        ["vfork"] => escapes::vfork(),
        ["posix-spawn"] => escapes::posix_spawn(),
        ["clone-parent"] => escapes::clone_parent(),
        ["cgroup-move", dir] => escapes::cgroup_move(dir),
        ["pid-namespace"] => escapes::pid_namespace(),
        ["namespaces"] => escapes::namespaces(),
        ["vanish", marker] => escapes::vanish(marker, None),
        ["vanish-to", dir, marker] => escapes::vanish(marker, Some(dir)),
        ["time-namespace"] => escapes::time_namespace(),
        ["clear-env", marker] => escapes::clear_env(marker),
        ["spawn-and-exit", status] => escapes::spawn_and_exit(number(status)?),
        ["exit-on-term", status] => signals::exit_on_term(number(status)?),
        ["ignore-term"] => signals::ignore_term(),
        ["ignore-term-grandchildren"] => signals::ignore_term_grandchildren(),
        ["stopped"] => signals::stopped(),
        ["fork-on-term"] => signals::fork_on_term(),
        ["slow-term", file, millis] => signals::slow_term(file, number(millis)?),
        ["refork-chain"] => endless::refork_chain(endless::DEFAULT_SECONDS),
        ["refork-chain", seconds] => endless::refork_chain(number(seconds)?),
        ["refork-chains", count] => endless::refork_chains(number(count)?, endless::DEFAULT_SECONDS),
        ["storm", count] => endless::storm(number(count)?, endless::DEFAULT_SECONDS, Sessions::One),
        ["storm", count, seconds] => endless::storm(number(count)?, number(seconds)?, Sessions::One),
        ["session-storm", count] => endless::storm(number(count)?, endless::DEFAULT_SECONDS, Sessions::Many),
        ["fork-loops", loops, count] => loops::fork_loops(number(loops)?, number(count)?),
        ["loop-on-term", count] => loops::loop_on_term(number(count)?),
        ["tcp", port] => holders::tcp(number(port)?),
        ["flock", file] => holders::flock(file),
        ["thread"] => held::thread(),
        ["vfork-wait"] => held::vfork_wait(),
        ["stat", file] => held::stat(file),
        ["user-namespace"] => held::user_namespace(),
        ["trace", tid, until] => held::trace(number(tid)?, until),
        ["tree", seed, max] => tree::root(number(seed)?, number(max)?),
        ["logged-tree", seed, max, file] => logged::root(number(seed)?, number(max)?, file),
        // What behaviours execute in processes that they create.
        ["at-rest", acks, ..] => escapes::at_rest(number(acks)?),
        ["logged-node", file, seed, budget, report] => {
            let (seed, budget, report) = (number(seed)?, number(budget)?, number(report)?);
            logged::Node { seed, budget, report }.live(file)
        }
        ["tree-node", kind, seed, budget, report] => {
            tree::executed_node(kind, number(seed)?, number(budget)?, number(report)?)
        }
        _ => bail!("no behaviour {args:?}\n{USAGE}"),
    }
}

fn number<N>(arg: &str) -> Result<N>
where
    N: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    arg.parse()
        .with_context(|| format!("failed to read {arg:?} as a number"))
}
