"""`filao pause`, `resume`, `cancel` and `delete`: what an operator changes in a queue."""

import click

from filao.cli.shell import addressed, as_json, broker_at, confirmed, note, print_lines
from filao.engine import State
from filao.errors import ConfigurationError
from filao.printable import some


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--group", metavar="GROUP", help="Only this group, of a queue with --group-dead halt.")
def pause(*, arguments: tuple[str, ...], group: str | None) -> None:
    """Stop deliveries from a queue, for all processes; sends go on.

    What is being worked on is finished. `filao resume` lets deliveries go on.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url, name) as broker:
        broker.pause(name, group=group)
    print_lines([as_json({"paused": name} if group is None else {"paused": name, "group": group})])


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--group", metavar="GROUP", help="Only this group, which was paused, or which a dead letter halted.")
def resume(*, arguments: tuple[str, ...], group: str | None) -> None:
    """Resume a paused queue, or a group that a dead letter halted."""
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url, name) as broker:
        broker.resume(name, group=group)
    print_lines([as_json({"resumed": name} if group is None else {"resumed": name, "group": group})])


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE ID")
def cancel(*, arguments: tuple[str, ...]) -> int:
    """Delete one message, if it still waits.

    Prints {"cancelled": true}. The exit code is 1 when it is being worked on, dead or gone.
    """
    url, (name, message_id) = addressed(arguments, least=2, most=2)
    with broker_at(url, name) as broker:
        was_cancelled = broker.cancel(name, message_id)
    print_lines([as_json({"cancelled": was_cancelled})])
    if not was_cancelled:
        note(f"no message {message_id!r} waits in queue {name!r}: it is worked on, dead or gone, or never was there")
    return 0 if was_cancelled else 1


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--messages", is_flag=True, help="With all the messages that it holds, dead letters included.")
@click.option("--yes", is_flag=True, help="Do not ask; required where there is no terminal to ask on.")
def delete(*, arguments: tuple[str, ...], messages: bool, yes: bool) -> int:
    """Delete a queue, with its rules and counters.

    One that holds messages is deleted only with --messages. It asks first; when the answer is no, the exit code is 1.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url, name) as broker:
        stats = broker.stats(name)
        held = sum(getattr(stats, state.value) for state in State)
        if held and not messages:
            raise ConfigurationError(
                f"queue {name!r} holds {some(held, 'message')}: receive or purge them first, or give --messages to "
                f"delete them with it"
            )
        with_them = f" and its {some(held, 'message')}" if held else ""
        if not yes and not confirmed("delete", f"Delete queue {name!r}{with_them}?"):
            note("nothing was deleted")
            return 1
        broker.delete_queue(name, messages=messages)
    print_lines([as_json({"deleted": name})])
    return 0
