// The stage: portal, queue, workers, and what is done. It draws the scene that it is given, as lists that a screen reader
// can read, and lets each claim travel from where it was to where it is now (first, last, invert, play). What the learner
// does to a worker it passes on as an event.

const TRAVEL_MS = 450;
const STAGGERED = 24; // claims that travel one after the other; more of them come at once

const Chip = {
  props: { chip: Object, words: Object },
  computed: {
    label() {
      const { claim, policy, attempt, locked, paid } = this.chip;
      let text = `${this.words.claim} ${claim}, ${this.words.policy} ${policy}`;
      if (attempt > 1) text += `, ${this.words.attempt} ${attempt}`;
      if (locked) text += `, ${this.words.locked}`;
      if (paid) text += `, ${this.words.paid}`;
      return text;
    },
  },
  template: `
    <span class="chip" :class="'policy-' + chip.colour" :data-chip="chip.id" :title="label">
      <span aria-hidden="true"><svg v-if="chip.locked" class="lock" viewBox="0 0 10 12"><path d="M2 5V3.5a3 3 0 0 1 6 0V5h1v7H1V5zm1.5 0h3V3.5a1.5 1.5 0 0 0-3 0z" fill="currentColor" fill-rule="evenodd"/></svg>{{ chip.number }}<sup v-if="chip.attempt > 1">{{ chip.attempt }}</sup></span>
      <span class="sr-only">{{ label }}</span>
    </span>`,
};

export default {
  components: { Chip },
  props: { initial: Object, words: Object },
  emits: ["act"],
  data() {
    return { scene: this.initial };
  },
  template: `
    <section class="stage" :class="{ frozen: scene.frozen }" :aria-label="words.stage">
      <div class="portal zone" ref="portal">
        <h3>{{ words.portal }}</h3>
        <p v-if="scene.portal.pid" class="quiet">pid {{ scene.portal.pid }}</p>
        <p v-else class="quiet">{{ words.closed }}</p>
        <p class="figure">{{ scene.portal.sent }} <small>{{ words.sent }}</small></p>
        <p v-if="scene.portal.answer_ms !== null" class="quiet">{{ words.answered }} {{ scene.portal.answer_ms }} ms</p>
        <p v-if="scene.portal.refused" class="bad">{{ scene.portal.refused }} {{ words.refused }}</p>
      </div>

      <div class="queue zone">
        <h3><code>{{ scene.queue }}</code></h3>
        <p v-if="!scene.has_queue" class="quiet">{{ words.no_queue }}</p>
        <template v-else>
          <ol class="slots" :aria-label="words.waiting">
            <li v-for="chip in scene.waiting" :key="chip.id"><Chip :chip="chip" :words="words" /></li>
            <li v-if="scene.more" class="more">+{{ scene.more }}</li>
            <li v-if="!scene.waiting.length" class="quiet">{{ words.empty }}</li>
          </ol>
          <div class="aside">
            <h4>↻ {{ words.delayed }}</h4>
            <ul class="slots" :aria-label="words.delayed">
              <li v-for="chip in scene.delayed" :key="chip.id">
                <Chip :chip="chip" :words="words" /> <small>{{ Math.max(0, chip.due).toFixed(1) }} s</small>
              </li>
              <li v-if="scene.more_delayed" class="more">+{{ scene.more_delayed }}</li>
              <li v-if="!scene.delayed.length" class="quiet">–</li>
            </ul>
            <h4>☠ {{ words.dead }}</h4>
            <ul class="slots" :aria-label="words.dead">
              <li v-for="chip in scene.dead" :key="chip.id"><Chip :chip="chip" :words="words" /></li>
              <li v-if="scene.more_dead" class="more">+{{ scene.more_dead }}</li>
              <li v-if="!scene.dead.length" class="quiet">–</li>
            </ul>
          </div>
        </template>
      </div>

      <div class="workers zone">
        <h3>{{ words.workers }}
          <span class="steps" v-if="scene.has_queue">
            <button type="button" @click="act('remove')" :disabled="!mine.length" :aria-label="words.remove_worker">−</button>
            <span aria-hidden="true">{{ mine.length }}</span>
            <button type="button" @click="act('add')" :disabled="mine.length >= 8" :aria-label="words.add_worker">+</button>
          </span>
        </h3>
        <p v-if="!scene.workers.length && !scene.fallen.length" class="quiet">{{ words.nobody }}</p>
        <ul class="cards">
          <li v-for="worker in scene.workers" :key="worker.number" class="card" :class="worker.state" :data-worker="worker.number">
            <p class="head"><b>{{ name(worker) }}</b> <span class="quiet">pid {{ worker.pid }}</span></p>
            <p class="state" :class="worker.state">{{ mark(worker) }} {{ words['state_' + worker.state] }}
              <span v-if="worker.paid" class="quiet">· {{ words.paid }}</span>
              <span v-if="worker.once" class="quiet">· {{ words.once }}</span>
              <b v-if="worker.over" class="bad">· {{ words.lease_over }}</b></p>
            <div class="hold">
              <Chip v-if="worker.holds" :chip="worker.holds" :words="words" />
              <template v-if="worker.left !== null">
                <progress :max="worker.lease" :value="worker.left" :aria-label="words.lease_left"></progress>
                <small>{{ worker.left.toFixed(1) }} s</small>
              </template>
            </div>
            <p class="quiet">{{ worker.handled }} {{ words.handled }} · {{ Math.round(worker.share * 100) }} %</p>
            <div class="acts" v-if="!worker.guest">
              <button type="button" class="danger" @click="act('kill', worker)" :aria-label="words.kill + ' – ' + name(worker)">{{ words.kill }}</button>
              <button type="button" v-if="worker.state !== 'paused'" @click="act('pause', worker)" :aria-label="words.pause + ' – ' + name(worker)">{{ words.pause }}</button>
              <button type="button" v-else class="on" @click="act('resume', worker)" :aria-label="words.resume + ' – ' + name(worker)">{{ words.resume }}</button>
              <button type="button" :class="{ on: worker.slow }" :aria-pressed="worker.slow" @click="act('slow', worker)" :aria-label="words.slow + ' – ' + name(worker)">{{ words.slow }}</button>
              <button type="button" :class="{ on: worker.fails }" :aria-pressed="worker.fails" @click="act('fail', worker)" :aria-label="words.fail + ' – ' + name(worker)">{{ words.fail }}</button>
            </div>
          </li>
          <li v-for="worker in scene.fallen" :key="'fallen' + worker.number" class="card fallen">
            <p class="head"><b>{{ name(worker) }}</b> <span class="quiet">pid {{ worker.pid }}</span></p>
            <p class="state killed">✖ {{ words['state_' + worker.state] }}</p>
          </li>
        </ul>
      </div>

      <div class="done zone">
        <h3>{{ words.done }}</h3>
        <p class="figure">{{ scene.paid }} <small>{{ words.payments }}</small></p>
        <ul class="slots" :aria-label="words.done">
          <li v-for="chip in scene.done" :key="chip.id" :class="{ twice: chip.times > 1 }"><Chip :chip="chip" :words="words" /><small v-if="chip.times > 1">×{{ chip.times }}</small></li>
        </ul>
      </div>
    </section>`,
  computed: {
    mine() {
      return this.scene.workers.filter((worker) => !worker.guest);
    },
  },
  methods: {
    show(scene) {
      this.scene = scene;
    },
    act(verb, worker) {
      this.$emit("act", { verb, worker: worker ? worker.number : null });
    },
    name(worker) {
      return worker.guest ? `${this.words.guest} (${worker.number})` : `${this.words.worker} ${worker.number}`;
    },
    mark(worker) {
      return { working: "▶", paused: "❚❚", starting: "…", waiting: "○" }[worker.state] || "✖";
    },
    places() {
      const found = new Map();
      for (const chip of this.$el.querySelectorAll("[data-chip]")) found.set(chip.dataset.chip, chip);
      return found;
    },
    isCalm() {
      return document.hidden || window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    },
    travel(chip, from, delay) {
      const to = chip.getBoundingClientRect();
      const dx = from.left - to.left;
      const dy = from.top - to.top;
      if (Math.abs(dx) + Math.abs(dy) < 3) return;
      chip.animate([{ transform: `translate(${dx}px, ${dy}px)`, zIndex: 5 }, { transform: "none", zIndex: 5 }], {
        duration: TRAVEL_MS,
        delay,
        easing: "ease-in-out",
        fill: "backwards",
      });
    },
  },
  beforeUpdate() {
    this.before = new Map();
    if (this.isCalm()) return;
    for (const [id, chip] of this.places()) this.before.set(id, chip.getBoundingClientRect());
  },
  updated() {
    if (this.isCalm() || !this.$refs.portal) return;
    const portal = this.$refs.portal.getBoundingClientRect();
    let fresh = 0;
    for (const [id, chip] of this.places()) {
      const was = this.before.get(id);
      if (was) this.travel(chip, was, 0);
      else if (this.started && chip.closest(".queue")) this.travel(chip, portal, Math.min(fresh++, STAGGERED) * 12);
    }
    this.started = true;
  },
};
