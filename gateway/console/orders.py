"""An administrator's word to the broker, who knows whether the key may give it."""

from typing import TypeVar

from ...wire.admin_messages import Administer, AdminOrder
from .visiting import Visitor

T = TypeVar("T")


async def ask(visitor: Visitor, order: AdminOrder, kind: type[T]) -> T:
    return await visitor.broker.ask(lambda number: Administer(number, order), kind)


async def tell(visitor: Visitor, order: AdminOrder) -> None:
    await visitor.broker.tell(lambda number: Administer(number, order))
