"""What tests stand on: servers, load, a model of the queue, a proxy and a learner."""
