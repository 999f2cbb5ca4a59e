//! Who keeps the counters that spare bystanders a lookup in the books: see [`Filter`].

use std::borrow::BorrowMut;

use aya::{
    Ebpf,
    maps::{Array, Map, MapData},
    programs::ProgramInfo,
};
use zinit_ebpf::{FILTER_ELEMENTS, FILTER_UNKNOWN, Filter, map, program};

use super::{
    books::{BooksError, OpenError, failed},
    hooks::HOOKS,
    load::LoadError,
    pins::PinDirectory,
};

/// What a build was built from.
type Sources = [u8; 32];

/// Says that the build with these sources keeps the counters from now on: those that are new, or were [taken over](take_over).
pub(super) fn keep(ebpf: &mut Ebpf, sources: Sources) -> Result<(), OpenError> {
    let mut last = Filter::default();
    for (word, bytes) in last.members.iter_mut().zip(sources.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    counters(ebpf)?
        .set(FILTER_ELEMENTS, last, 0)
        .map_err(failed("note who keeps the filter"))?;
    Ok(())
}

/// Makes counters that may have missed members say that there may be members everywhere: those of which somebody else than the build
/// that is attached was the last to say that they were kept, and those that did not exist while it was. For good, as what was missed
/// stays unknown. The hooks of this build are not attached yet.
pub(super) fn take_over(ebpf: &mut Ebpf, attached: Sources) -> Result<(), OpenError> {
    let mut counters = counters(ebpf)?;
    if kept_by(&counters)? == attached {
        return Ok(());
    }
    Ok(doubt(&mut counters)?)
}

/// The same where a program that changes the books is pinned that does not keep the counters: its build died while it replaced others.
/// Without it the counters would be taken for kept, as the layout names the build that was to be replaced.
pub(super) fn settle(pins: &PinDirectory) -> Result<(), OpenError> {
    let path = pins.map(map::FILTER);
    if !path.exists() {
        return Ok(());
    }
    let data = MapData::from_pin(&path).map_err(failed("open the filter"))?;
    let id = data.info().map_err(failed("inspect the filter"))?.id();
    let changing = HOOKS
        .iter()
        .map(|(name, _)| *name)
        .chain([program::ADOPT, program::RELEASE]);
    for name in changing {
        let place = pins.program(name);
        // The kernel may have been too old for it.
        if !place.exists() {
            continue;
        }
        let info = ProgramInfo::from_pin(&place).map_err(failed("inspect a program"))?;
        let maps = info.map_ids().map_err(failed("inspect a program"))?;
        // No answer before 4.15.
        if maps.is_some_and(|maps| !maps.contains(&id)) {
            let mut counters = Array::try_from(Map::Array(data)).map_err(failed("open the filter"))?;
            return Ok(doubt(&mut counters)?);
        }
    }
    Ok(())
}

fn doubt(counters: &mut Array<impl BorrowMut<MapData>, Filter>) -> Result<(), BooksError> {
    let unknown = Filter {
        members: [FILTER_UNKNOWN; 16],
    };
    let first = counters.get(&0, 0).map_err(failed("read the filter"))?;
    if first.members[0] >= FILTER_UNKNOWN / 2 {
        return Ok(());
    }
    // The first one last: it says that all are.
    for element in (0..FILTER_ELEMENTS).rev() {
        // A member that is counted at this moment need not be.
        counters
            .set(element, unknown, 0)
            .map_err(failed("change what spares bystanders a lookup"))?;
    }
    Ok(())
}

fn counters(ebpf: &mut Ebpf) -> Result<Array<&mut MapData, Filter>, LoadError> {
    let map = ebpf.map_mut(map::FILTER).ok_or(LoadError::NoMap(map::FILTER))?;
    map.try_into().map_err(|source| LoadError::Map {
        map: map::FILTER,
        source: Box::new(source),
    })
}

fn kept_by(counters: &Array<&mut MapData, Filter>) -> Result<Sources, BooksError> {
    let last = counters
        .get(&FILTER_ELEMENTS, 0)
        .map_err(failed("read who keeps the filter"))?;
    let mut sources = [0; 32];
    for (bytes, word) in sources.chunks_exact_mut(4).zip(last.members) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(sources)
}
