"""The sandbox: a page on which a learner builds the insurer of EVT-02 and watches competing consumers at work.

Whatever is shown is real. A `Room` is one learner's insurer: a file, a portal, workers and a printer of letters, each a
process of its own. `chronicle` tells from their journals, from the engine and from the business table what happened, and `lesson` what
of it the learner has seen. `page` draws it; `server` gives every browser a room of its own.
"""
