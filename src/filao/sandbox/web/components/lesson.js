// The lesson: ten steps, each a claim, a prediction, something to do, what must then be seen, and why. What has been seen is decided by
// the server, from the broker's state.

export default {
  props: { initial: Object, words: Object },
  emits: ["predict", "act", "go"],
  data() {
    return { scene: this.initial, copied: false };
  },
  template: `
    <section class="lesson box" :aria-label="words.lesson">
      <nav class="numbers" :aria-label="words.lesson">
        <button v-for="(step, place) in scene.steps" :key="step.key" type="button" :class="{ done: step.done }"
          :aria-current="place === scene.current ? 'step' : null"
          :aria-label="words.step + ' ' + (place + 1) + ': ' + step.title + ', ' + (step.done ? words.step_done : words.step_open)"
          @click="$emit('go', place)">{{ place + 1 }}</button>
      </nav>
      <h2>{{ scene.current + 1 }}. {{ scene.title }}</h2>
      <p v-html="inline(scene.claim)"></p>
      <fieldset>
        <legend>{{ words.question }}</legend>
        <p :id="'question-' + scene.key">{{ scene.question }}</p>
        <label v-for="(option, place) in scene.options" :key="scene.key + place">
          <input type="radio" :name="'prediction-' + scene.key" :checked="scene.chosen === place" @change="$emit('predict', place)" />
          <span>{{ option }}<b v-if="scene.revealed && place === scene.answer" class="good"> ✓</b></span>
        </label>
        <p v-if="scene.revealed" role="status"><b>{{ scene.chosen === scene.answer ? words.right : words.wrong }}</b></p>
      </fieldset>
      <h3>{{ words.do }}</h3>
      <p v-html="inline(scene.do)"></p>
      <div class="row-of">
        <button v-for="action in scene.actions" :key="action.key" type="button" class="strong" :disabled="scene.busy" @click="$emit('act', action.key)">{{ action.text }}</button>
      </div>
      <table v-if="scene.trials">
        <thead><tr><td></td><th scope="col">{{ words.trial_before }}</th><th scope="col">{{ words.trial_after }}</th></tr></thead>
        <tbody><tr v-for="row in scene.trials" :key="row.guarantee"><th scope="row">{{ words[row.guarantee] }}</th>
          <td v-for="(times, place) in row.times" :key="place">{{ words['trial_' + times] }}</td></tr></tbody>
      </table>
      <h3>{{ words.see }}</h3>
      <ul class="see">
        <li v-for="condition in scene.conditions" :key="condition.key" :class="{ met: condition.met }" :data-condition="condition.key">
          <span v-html="inline(condition.text)"></span><span class="sr-only"> – {{ condition.met ? words.step_done : words.step_open }}</span></li>
      </ul>
      <div v-if="scene.done" class="why" role="status">
        <h3>{{ words.why }}</h3>
        <p v-html="inline(scene.why)"></p>
        <p v-if="scene.all_done"><b>{{ words.all_done }}</b></p>
      </div>
      <details>
        <summary>{{ words.python }}</summary>
        <pre tabindex="0" :aria-label="words.python">{{ scene.program }}</pre>
        <button type="button" @click="copy">{{ copied ? words.copied : words.copy }}</button>
      </details>
      <div class="row-of">
        <button type="button" :disabled="scene.current === 0" @click="$emit('go', scene.current - 1)">{{ words.previous }}</button>
        <button type="button" :class="{ strong: scene.done }" :disabled="scene.current === scene.steps.length - 1" @click="$emit('go', scene.current + 1)">{{ words.next }}</button>
      </div>
    </section>`,
  methods: {
    show(scene) {
      if (scene.key !== this.scene.key) this.copied = false;
      const isNews = scene.done && !this.scene.done && scene.key === this.scene.key;
      this.scene = scene;
      if (isNews) this.$nextTick(() => this.$el.querySelector(".why").scrollIntoView({ block: "nearest" }));
    },
    inline(text) {
      const escaped = text.replace(/[&<>]/g, (mark) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[mark]);
      return escaped.replace(/`([^`]*)`/g, "<code>$1</code>");
    },
    async copy() {
      await navigator.clipboard.writeText(this.scene.program);
      this.copied = true;
    },
  },
};
