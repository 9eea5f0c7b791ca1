"""A batch of sends, settles, extends and receives, on the books of one transaction."""

from collections import defaultdict
from collections.abc import Sequence

from filao.engine import Extend, Operation, Receive, Result, Send, Settle
from filao.engines.sqlite.books import Books
from filao.engines.sqlite.receive import Lessee, receive
from filao.engines.sqlite.send import send
from filao.engines.sqlite.settle import ack_together, extend, extend_together, is_plain_ack, settle


def apply(books: Books, operations: Sequence[Operation], lessee: Lessee) -> list[Result]:
    """Do the operations in order, but receive last, so that what became ready in this batch is found."""
    results: list[Result] = [None] * len(operations)
    receives: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    acked = extended = False
    if len(operations) > 1:
        acked = ack_together(books, [one for one in operations if is_plain_ack(one)], lessee)
        extended = extend_together(books, [one for one in operations if isinstance(one, Extend)], lessee)
    for index, operation in enumerate(operations):
        if (acked and is_plain_ack(operation)) or (extended and isinstance(operation, Extend)):
            continue
        if isinstance(operation, Send):
            results[index] = send(books, operation)
        elif isinstance(operation, Settle):
            results[index] = settle(books, operation, lessee)
        elif isinstance(operation, Receive):
            terms = (operation.queue, operation.lease)
            receives[terms].append(index)
        else:
            results[index] = extend(books, operation, lessee)
    for indexes in receives.values():
        asked = [operation for index in indexes if isinstance(operation := operations[index], Receive)]
        for index, result in zip(indexes, receive(books, asked, lessee), strict=True):
            results[index] = result
    return results
