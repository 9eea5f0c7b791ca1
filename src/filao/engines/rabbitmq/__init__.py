"""RabbitMQ as an engine: quorum queues on a server or a cluster, shared with programs that do not use Filao."""

from importlib import import_module

from filao.extras import Extra

with Extra("filao[rabbitmq]", of="an amqp:// URL"):
    import_module("aio_pika")  # of all modules here

from filao.engines.rabbitmq.engine import RabbitmqEngine

__all__ = ["RabbitmqEngine"]
